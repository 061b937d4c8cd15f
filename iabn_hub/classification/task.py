"""Training and validating a classifier: one class per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.folders import Location, check_same_classes, classes_of, open_split
from ..datasets.loaders import BatchPlan, TrainLoader, val_loader
from ..datasets.samples import samples_of
from ..datasets.transforms import train_transform, val_transform
from ..recipes import Recipe
from ..recipes.metrics import FEWEST_FOR_TOP5
from ..world import World
from .figures import figures
from .metrics import ClassificationMetrics, ConfidentError, check_labels


class ClassificationTask:
    """See `training.task.Task`."""

    counts = ("correct", "correct_top5")

    @property
    def monitors(self) -> tuple[str, ...]:
        return ("top1", "top5") if self._num_classes >= FEWEST_FOR_TOP5 else ("top1",)

    @property
    def _num_classes(self) -> int:
        return len(self.classes) if self.classes else self.recipe.network.classes

    def __init__(self, recipe: Recipe, location: Location, world: World) -> None:
        self.recipe, self.world = recipe, world
        seed = recipe.training.seed
        self.train = open_split(location, location.train_split, True, recipe.micro_batch(world.size), seed)
        self.val = open_split(location, location.val_split)
        check_same_classes(location, self.train, self.val)
        self.classes = classes_of(self.train)
        self.notes = tuple(note for note in [getattr(self.train, "note", "")] if note)
        self._name_of: Callable[[int], str] | None = None  # of a validation image

    def train_loader(self, out: Path, workers: int, cache_images: bool = False) -> TrainLoader:
        training = self.recipe.training
        samples = samples_of(self.train, train_transform(self.recipe), self.world, training.seed, training=True)
        if cache_images:
            samples.keep_decoded(self.recipe.input.scale_train)
        plan = BatchPlan(self.recipe.optimizer.batch_size, training.accumulation_steps, training.repeats, training.seed)
        return TrainLoader(samples, plan, workers, self.world)

    def val_loader(self, workers: int) -> Any:
        images = self.recipe.input
        samples = samples_of(self.val, val_transform(images.scale_val, images.crop_val), self.world)
        self._name_of = samples.name
        return val_loader(samples, self.recipe.micro_batch(self.world.size), workers, self.world)

    def check_labels(self, labels: Tensor, classes: int) -> None:
        check_labels(labels, classes)

    def logits_at_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def count(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        hits = logits.topk(min(5, logits.size(1))).indices == labels[:, None]
        return [hits[:, 0].sum(), hits.sum()]

    def train_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        images = max(sums["images"], 1)
        sums_of = {"top1": "correct", "top5": "correct_top5"}
        return {name: 100 * sums[sums_of[name]] / images for name in self.monitors}

    def error_pictures(self, details: Mapping[str, Any]) -> str:
        errors = [ConfidentError(**each) for each in details.get("errors", ())]
        return figures(errors, self._name_of, self.classes) if self._name_of else ""

    def new_metrics(self, num_classes: int, device: torch.device) -> ClassificationMetrics:
        return ClassificationMetrics(num_classes)
