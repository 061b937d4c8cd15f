"""Training and validating a segmentation network: one class per pixel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.class_presence import find_presence
from ..datasets.folders import DataError, Location
from ..datasets.loaders import BatchPlan, TrainLoader, val_loader
from ..datasets.segmentation import IGNORE_INDEX, SegmentationSamples, open_segmentation
from ..datasets.segmentation_transforms import SegmentationCrop, WholeImage
from ..recipes import Recipe
from ..world import World
from .metrics import SegmentationMetrics


class SegmentationTask:
    """See `training.task.Task`. The logits are resized to the labels, for the loss and for the metrics."""

    notes: tuple[str, ...] = ()
    counts = ("correct", "pixels")
    monitors = ("miou", "pixel_accuracy")

    def __init__(self, recipe: Recipe, location: Location, world: World) -> None:
        self.recipe, self.world = recipe, world
        self.train, self.val = (
            open_segmentation(Path(location.root), split, recipe.network.classes, recipe.segmentation.ignore_index)
            for split in (location.train_split, location.val_split)
        )
        self.classes = self.train.classes

    def train_loader(self, out: Path, workers: int, cache_images: bool = False) -> TrainLoader:
        if cache_images:
            raise DataError("--cache-images is for classification: leave it out")
        recipe, source = self.recipe, self.train
        if recipe.segmentation.class_balanced > 0:
            presence = find_presence(source, out / "presence.npz", workers, self.world)
            source = source.balanced(presence, recipe.segmentation.class_balanced)
        samples = SegmentationSamples(source, SegmentationCrop(recipe), recipe.training.seed, training=True)
        plan = BatchPlan(recipe.optimizer.batch_size, recipe.training.accumulation_steps, seed=recipe.training.seed)
        return TrainLoader(samples, plan, workers, self.world)

    def val_loader(self, workers: int) -> Any:
        samples = SegmentationSamples(self.val, WholeImage(self.recipe.segmentation.long_side_val))
        return val_loader(samples, 1, workers, self.world)  # the images differ in size

    def check_labels(self, labels: Tensor, classes: int) -> None:
        pass  # every label file is checked when it is read

    def logits_at_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.interpolate(logits, labels.shape[-2:], mode="bilinear")

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        # torch's own mean is NaN where no pixel is scored.
        total = F.cross_entropy(
            logits, targets.long(), ignore_index=IGNORE_INDEX, label_smoothing=smoothing, reduction="sum"
        )
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def count(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        predictions = logits.argmax(1)
        return [(predictions == labels).sum(), (labels != IGNORE_INDEX).sum()]

    def train_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"pixel_accuracy": 100 * sums["correct"] / max(sums["pixels"], 1)}

    def error_pictures(self, details: Mapping[str, Any]) -> str:
        return ""  # TensorBoard shows predictions

    def new_metrics(self, num_classes: int, device: torch.device) -> SegmentationMetrics:
        return SegmentationMetrics(num_classes, device, self.classes)
