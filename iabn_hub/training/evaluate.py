"""What a network gets right: exact counts over every image, whatever the number of processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..processes import Processes, autocast
from .data import Batch

MISTAKES_KEPT = 50  # the surest of each process


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class: its number in the data, and the probability of the guess."""

    index: int
    label: int
    guess: int
    probability: float


@dataclass
class Score:
    """Counts of images, from which the figures follow; `confusions` holds (label, guess) pairs that differ."""

    images: int = 0
    right: int = 0
    right_of_five: int = 0
    total_loss: float = 0.0
    seconds: float = 0.0
    per_class: Counter[int] = field(default_factory=Counter)
    right_per_class: Counter[int] = field(default_factory=Counter)
    confusions: Counter[tuple[int, int]] = field(default_factory=Counter)
    mistakes: list[Mistake] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Percentage of images whose class is the first guess."""
        return 100 * self.right / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Percentage of images whose class is among the first five guesses."""
        return 100 * self.right_of_five / max(self.images, 1)

    @property
    def loss(self) -> float:
        """Mean cross-entropy of an image."""
        return self.total_loss / max(self.images, 1)

    def figures(self) -> dict[str, float]:
        """The figures by name: percentages, and the loss."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}

    def details(self) -> dict[str, Any]:
        """Nothing more than the figures, for the file of a run."""
        return {}

    def shown(self) -> Sequence[np.ndarray]:
        """No pictures."""
        return ()

    def add(self, other: Score) -> None:
        """Take in the counts of another share of the images."""
        self.images += other.images
        self.right += other.right
        self.right_of_five += other.right_of_five
        self.total_loss += other.total_loss
        self.seconds = max(self.seconds, other.seconds)
        self.per_class += other.per_class
        self.right_per_class += other.right_per_class
        self.confusions += other.confusions
        self.mistakes = sorted([*self.mistakes, *other.mistakes], key=lambda m: (-m.probability, m.index))
        self.broken += other.broken

    def count(self, logits: Tensor, batch: Batch) -> None:
        """Take in one batch; logits (N, C) float32 on the CPU."""
        labels = batch.labels
        guesses = logits.topk(min(5, logits.size(1))).indices
        hits = guesses == labels[:, None]
        self.images += len(labels)
        self.right += int(hits[:, 0].sum())
        self.right_of_five += int(hits.any(1).sum())
        self.total_loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        first = guesses[:, 0]
        self.per_class.update(labels.tolist())
        self.right_per_class.update(labels[hits[:, 0]].tolist())
        wrong = ~hits[:, 0]
        if wrong.any():
            probabilities = logits.softmax(1).gather(1, first[:, None])[:, 0]
            facts = zip(*(v[wrong].tolist() for v in (batch.indices, labels, first, probabilities)))
            mistakes = [Mistake(*fact) for fact in facts]
            self.confusions.update((m.label, m.guess) for m in mistakes)
            self.mistakes = sorted([*self.mistakes, *mistakes], key=lambda m: (-m.probability, m.index))[:MISTAKES_KEPT]


def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    normalize: nn.Module,
    processes: Processes,
    *,
    amp: str = "off",
    channels_last: bool = False,
    text: str = "",
) -> Score:
    """Score `network` in eval mode on this process's `batches`, and add up what all processes counted.

    Ten crops of an image, (N, 10, 3, H, W), count by the mean of their logits.

    Args:
        normalize: makes the network's input of the bytes; see `transforms.Normalize`.
        text: what the progress bar says; without it there is none.

    Returns:
        The same score on every process.

    Raises:
        ValueError: a label is none of the network's classes.
    """
    was_training = network.training
    network.eval()
    normalize.eval()
    mine = Score()
    started = time.perf_counter()
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(batches, text, total, unit="batch", disable=None if text and processes.first else True, leave=False)
    with torch.inference_mode():
        for batch in bar:
            mine.broken += batch.broken
            if len(batch.labels) == 0:
                continue
            images = normalize(batch.images.to(processes.device, non_blocking=True))
            crops = images.shape[1] if images.dim() == 5 else 1
            images = images.flatten(0, 1) if crops > 1 else images
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast(processes.device, amp):
                logits: Any = network(images)
            check_labels(batch.labels, logits.size(1))
            mine.count(logits.float().view(-1, crops, logits.size(1)).mean(1).cpu(), batch)
    mine.seconds = time.perf_counter() - started
    network.train(was_training)
    score = Score()
    for share in processes.gather(mine):
        score.add(share)
    return score


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse a batch with labels that the network does not have."""
    if len(labels) and (int(labels.max()) >= classes or int(labels.min()) < 0):
        raise ValueError(
            f"the data has class {int(labels.max() if labels.max() >= classes else labels.min())}, "
            f"the network has classes 0 to {classes - 1}: set network.classes, or use the right network"
        )
