"""The one interface through which training knows what a network is trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..classification.task import ClassificationTask
from ..datasets.folders import Location
from ..datasets.loaders import TrainLoader
from ..evaluation import Metrics
from ..recipes import Recipe
from ..segmentation.task import SegmentationTask
from ..world import World


class Task(Protocol):
    """The data, the loss and the metrics of a run.

    `classes` are their names, where the data states them, and `notes` sentences for the log.
    `counts` names what `count` sums over training images.
    `monitors` names validation metrics: the first decides which snapshot is the best, all are logged.
    """

    classes: tuple[str, ...] | None
    notes: tuple[str, ...]

    @property
    def counts(self) -> tuple[str, ...]: ...
    @property
    def monitors(self) -> tuple[str, ...]: ...

    def train_loader(self, out: Path, workers: int, cache_images: bool = False) -> TrainLoader:
        """Training batches; `out` is the folder of the run. With `cache_images` each image is decoded once."""

    def val_loader(self, workers: int) -> Any:
        """This rank's share of the batches to validate on."""

    def check_labels(self, labels: Tensor, classes: int) -> None:
        """Refuse labels that are not among the network's classes."""

    def logits_at_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits, float32, at the positions of the labels: what `loss` and `count` take."""

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Cross-entropy, the mean over what is scored."""

    def count(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        """The values of `counts` for one batch."""

    def train_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of training from the sums of `counts` and 'images'."""

    def error_pictures(self, details: Mapping[str, Any]) -> str:
        """The worst errors of a validation as HTML, from the `details` of its metrics; '' where there are none."""

    def new_metrics(self, num_classes: int, device: torch.device) -> Metrics:
        """Empty metrics for one validation."""


def make_task(recipe: Recipe, location: Location, world: World) -> Task:
    """Open the data for the task of a recipe's network.

    Raises:
        DataError: it is not there, or not as the task needs it.
    """
    if recipe.task == "segmentation":
        return SegmentationTask(recipe, location, world)
    return ClassificationTask(recipe, location, world)


# Names as people write them.
TITLES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "pixel_accuracy": "pixel accuracy", "loss": "loss"}


def format_metrics(values: dict[str, float], names: Sequence[str]) -> str:
    """'top-1 98.20 %  top-5 …' of the metrics with these names."""
    return "  ".join(f"{TITLES[name]} {values[name]:.2f} %" for name in names)
