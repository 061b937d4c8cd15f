"""Metrics of classification: exact counts over every image, whatever the number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..datasets.samples import Batch
from ..recipes.metrics import FEWEST_FOR_TOP5
from ..world import World

MAX_ERRORS = 50  # most confident errors that each rank keeps
REPORTED_ERRORS = 12  # of them in the results of a run
MOST_FOR_MATRIX = 40  # classes; a larger confusion matrix cannot be read


@dataclass(frozen=True)
class ConfidentError:
    """A misclassified image: its index in the dataset, and the probability of the predicted class."""

    index: int
    label: int
    prediction: int
    probability: float


@dataclass
class ClassificationMetrics:
    """Counts of images; `confusions` counts (label, prediction) pairs that differ.

    Args:
        num_classes: of the network; top-5 is a metric where there are more than five.
    """

    num_classes: int = 1000
    images: int = 0
    correct: int = 0
    correct_top5: int = 0
    total_loss: float = 0.0
    seconds: float = 0.0
    per_class: Counter[int] = field(default_factory=Counter)
    correct_per_class: Counter[int] = field(default_factory=Counter)
    confusions: Counter[tuple[int, int]] = field(default_factory=Counter)
    errors: list[ConfidentError] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Percentage of images whose class is the most probable one."""
        return 100 * self.correct / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Percentage of images whose class is among the five most probable ones."""
        return 100 * self.correct_top5 / max(self.images, 1)

    @property
    def loss(self) -> float:
        """Mean cross-entropy of an image."""
        return self.total_loss / max(self.images, 1)

    def values(self) -> dict[str, float]:
        top5 = {"top5": self.top5} if self.num_classes >= FEWEST_FOR_TOP5 else {}
        return {"loss": self.loss, "top1": self.top1, **top5}

    def details(self) -> dict[str, Any]:
        """`per_class`: for each class the number of its images and of the correct ones; of up to 40 classes the
        `confusion` matrix, rows: labels; `errors`: the most confident ones."""
        classes = range(self.num_classes)
        found: dict[str, Any] = {"per_class": [[self.per_class[i], self.correct_per_class[i]] for i in classes]}
        if self.num_classes <= MOST_FOR_MATRIX:
            counts = {**self.confusions, **{(i, i): self.correct_per_class[i] for i in classes}}
            found["confusion"] = [[counts.get((label, i), 0) for i in classes] for label in classes]
        return found | {"errors": [asdict(each) for each in self.errors[:REPORTED_ERRORS]]}

    def pictures(self) -> Sequence[np.ndarray]:
        return ()

    def update(self, network: nn.Module, images: Tensor, batch: Batch) -> None:
        """Accumulate one batch. Ten crops of an image, (N, 10, 3, H, W), are scored by the mean of their logits."""
        crops = images.shape[1] if images.dim() == 5 else 1
        logits: Any = network(images.flatten(0, 1) if crops > 1 else images)
        check_labels(batch.labels, logits.size(1))
        self.count(logits.float().view(-1, crops, logits.size(1)).mean(1).cpu(), batch)

    def count(self, logits: Tensor, batch: Batch) -> None:
        """Accumulate logits (N, C), float32, on the CPU."""
        labels = batch.labels
        predictions = logits.topk(min(5, logits.size(1))).indices
        hits = predictions == labels[:, None]
        self.images += len(labels)
        self.correct += int(hits[:, 0].sum())
        self.correct_top5 += int(hits.any(1).sum())
        self.total_loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        first = predictions[:, 0]
        self.per_class.update(labels.tolist())
        self.correct_per_class.update(labels[hits[:, 0]].tolist())
        wrong = ~hits[:, 0]
        if wrong.any():
            probabilities = logits.softmax(1).gather(1, first[:, None])[:, 0]
            columns = torch.stack([batch.indices, labels, first])[:, wrong].T.tolist()
            errors = [
                ConfidentError(i, label, p, q) for (i, label, p), q in zip(columns, probabilities[wrong].tolist())
            ]
            self.confusions.update((e.label, e.prediction) for e in errors)
            self.errors = _most_confident([*self.errors, *errors])[:MAX_ERRORS]

    def synchronized(self, world: World) -> ClassificationMetrics:
        merged = ClassificationMetrics(self.num_classes)
        for share in world.all_gather_object(self):
            merged.add(share)
        return merged

    def add(self, other: ClassificationMetrics) -> None:
        """Accumulate the counts of other images."""
        self.images += other.images
        self.correct += other.correct
        self.correct_top5 += other.correct_top5
        self.total_loss += other.total_loss
        self.seconds = max(self.seconds, other.seconds)
        self.per_class += other.per_class
        self.correct_per_class += other.correct_per_class
        self.confusions += other.confusions
        self.errors = _most_confident([*self.errors, *other.errors])
        self.skipped += other.skipped


def _most_confident(errors: list[ConfidentError]) -> list[ConfidentError]:
    return sorted(errors, key=lambda error: (-error.probability, error.index))


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are not among the network's classes."""
    if len(labels) and (int(labels.max()) >= classes or int(labels.min()) < 0):
        raise ValueError(
            f"the data has class {int(labels.max() if labels.max() >= classes else labels.min())}, "
            f"the network has classes 0 to {classes - 1}: set network.classes, or use another network"
        )
