"""What a segmentation network gets right: intersection over union of each class, exact over all scenes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from ..processes import Processes, autocast
from ..segmentation.palette import Palette, palette_of
from ..segmentation.predict import Views, predict
from .data import Batch
from .scenes import IGNORED

SHOWN = 4  # scenes that the first process keeps as pictures
SIDE = 512  # longer side of such a picture's parts, in pixels


@dataclass
class SceneScore:
    """`confusion` counts pixels, (classes, classes) int64: rows are the truth, columns the guesses."""

    confusion: Tensor
    images: int
    seconds: float
    broken: list[str]
    pictures: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def iou(self) -> Tensor:
        """|truth ∩ guess| / |truth ∪ guess| of each class in percent, float64; NaN where neither has a pixel of it."""
        both = self.confusion.diagonal().double()
        return 100 * both / (self.confusion.sum(0) + self.confusion.sum(1) - both)

    @property
    def miou(self) -> float:
        """The mean of `iou` over the classes that are there."""
        return float(self.iou.nanmean()) if self.confusion.any() else 0.0

    @property
    def accuracy(self) -> float:
        """Percentage of pixels whose class is right."""
        return 100 * float(self.confusion.diagonal().sum()) / max(int(self.confusion.sum()), 1)

    def figures(self) -> dict[str, float]:
        return {"miou": self.miou, "accuracy": self.accuracy}

    def details(self) -> dict[str, Any]:
        return {"iou": [None if value != value else value for value in self.iou.tolist()]}

    def shown(self) -> Sequence[np.ndarray]:
        return self.pictures


def evaluate_scenes(
    network: nn.Module,
    batches: Iterable[Batch],
    normalize: nn.Module,
    processes: Processes,
    *,
    classes: Sequence[str] | None = None,
    views: Views | None = None,
    amp: str = "off",
    channels_last: bool = False,
    text: str = "",
) -> SceneScore:
    """Score `network` in eval mode on this process's `batches`, and add up what all processes counted.

    The guesses are scaled to the size of the labels, whose nearest pixel counts.

    Args:
        batches: of one scene each; see `scenes.WholeScenes`.
        normalize: makes the network's input of the bytes.
        classes: their names, which choose the colours of the pictures.
        views: scales, mirrors and tiles; by default the scene as it is.
        text: what the progress bar says; without it there is none.

    Returns:
        The same score on every process, but for the pictures, which the first one has.
    """
    was_training = network.training
    network.eval()
    normalize.eval()
    count: Any = network.num_classes
    palette = palette_of(count, classes)
    # torchmetrics adds up the counts of all processes when it computes.
    matrix = MulticlassConfusionMatrix(count, ignore_index=IGNORED, validate_args=False).to(processes.device)
    images, broken, pictures = 0, list[str](), list[np.ndarray]()
    started = time.perf_counter()
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(batches, text, total, unit="scene", disable=None if text and processes.first else True, leave=False)
    for batch in bar:
        broken += batch.broken
        if len(batch.labels) == 0:
            continue
        shown = normalize(batch.images.to(processes.device, non_blocking=True))
        if channels_last:
            shown = shown.contiguous(memory_format=torch.channels_last)
        with autocast(processes.device, amp):
            _, guesses = predict(network, shown, views or Views())
        labels = batch.labels.to(processes.device, non_blocking=True)
        guesses = F.interpolate(guesses[:, None], labels.shape[1:], mode="nearest-exact")[:, 0]
        matrix.update(guesses.long(), labels.long())
        images += len(labels)
        if processes.first and len(pictures) < SHOWN:
            pictures.append(_picture(batch.images[0], batch.labels[0], guesses[0].cpu(), palette))
    network.train(was_training)
    confusion = matrix.compute().cpu()
    shares = processes.gather((images, time.perf_counter() - started, broken))
    return SceneScore(
        confusion,
        sum(share[0] for share in shares),
        max(share[1] for share in shares),
        [reason for share in shares for reason in share[2]],
        pictures,
    )


def _picture(image: Tensor, truth: Tensor, guess: Tensor, palette: Palette) -> np.ndarray:
    """The scene, the truth and the guess, side by side; black is what does not count."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette.colors)] = palette.colors
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    photo.thumbnail((SIDE, SIDE))
    parts = [np.asarray(photo)]
    for labels in (truth, guess):
        colored = Image.fromarray(colors[labels.numpy()]).resize(photo.size, Image.Resampling.NEAREST)
        parts.append(np.asarray(colored))
    return np.concatenate(parts, 1)
