"""Metrics of semantic segmentation: intersection over union of each class, exact over all images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from ..datasets.samples import Batch
from ..datasets.segmentation import IGNORE_INDEX
from ..world import World
from .palette import Palette, palette_of
from .predict import Views, predict

MAX_PICTURES = 4  # images that rank 0 keeps as pictures
PICTURE_SIDE = 512  # longer side of each part of a picture, in pixels


class SegmentationMetrics:
    """A confusion matrix over pixels.

    Predictions are resized to the labels by nearest neighbour.

    Args:
        num_classes: of the network.
        device: of the network.
        classes: their names, which choose the colours of the pictures.
        views: scales, flips and tiles; by default the image as it is.
    """

    def __init__(
        self,
        num_classes: int,
        device: torch.device,
        classes: Sequence[str] | None = None,
        views: Views | None = None,
    ) -> None:
        self.images, self.seconds = 0, 0.0
        self.skipped: list[str] = []
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)  # rows: labels; columns: predictions
        self._palette: Palette = palette_of(num_classes, classes)
        self._views = views or Views()
        self._pictures: list[np.ndarray] = []
        # torchmetrics sums the counts of all ranks when it computes.
        self._matrix = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE_INDEX, validate_args=False).to(device)

    @property
    def iou(self) -> Tensor:
        """|label ∩ prediction| / |label ∪ prediction| of each class in percent, float64; NaN where both are empty."""
        both = self.confusion.diagonal().double()
        return 100 * both / (self.confusion.sum(0) + self.confusion.sum(1) - both)

    @property
    def miou(self) -> float:
        """The mean of `iou` over the classes that occur."""
        return float(self.iou.nanmean()) if self.confusion.any() else 0.0

    @property
    def pixel_accuracy(self) -> float:
        """Percentage of pixels whose class is correct."""
        return 100 * float(self.confusion.diagonal().sum()) / max(int(self.confusion.sum()), 1)

    def values(self) -> dict[str, float]:
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy}

    def details(self) -> dict[str, Any]:
        return {"iou": [None if value != value else value for value in self.iou.tolist()]}

    def pictures(self) -> Sequence[np.ndarray]:
        """Image, labels and prediction side by side, of the first images; on rank 0."""
        return self._pictures

    def update(self, network: nn.Module, images: Tensor, batch: Batch) -> None:
        """Accumulate a batch of images of one size."""
        _, predictions = predict(network, images, self._views)
        labels = batch.labels.to(images.device, non_blocking=True)
        predictions = F.interpolate(predictions[:, None], labels.shape[1:], mode="nearest-exact")[:, 0]
        self._matrix.update(predictions.long(), labels.long())
        self.images += len(labels)
        if len(self._pictures) < MAX_PICTURES:
            self._pictures.append(_picture(batch.images[0], batch.labels[0], predictions[0].cpu(), self._palette))

    def synchronized(self, world: World) -> SegmentationMetrics:
        """These metrics, now over all ranks; the pictures stay those of this rank."""
        self.confusion = self._matrix.compute().cpu()
        shares = world.all_gather_object((self.images, self.seconds, self.skipped))
        self.images = sum(share[0] for share in shares)
        self.seconds = max(share[1] for share in shares)
        self.skipped = [reason for share in shares for reason in share[2]]
        if not world.is_primary:
            self._pictures = []
        return self


def _picture(image: Tensor, label: Tensor, prediction: Tensor, palette: Palette) -> np.ndarray:
    """Image, labels and prediction side by side; pixels that are not scored are black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette.colors)] = palette.colors
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    photo.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    parts = [np.asarray(photo)]
    for classes in (label, prediction):
        colored = Image.fromarray(colors[classes.numpy()]).resize(photo.size, Image.Resampling.NEAREST)
        parts.append(np.asarray(colored))
    return np.concatenate(parts, 1)
