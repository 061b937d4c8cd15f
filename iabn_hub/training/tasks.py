"""What training a classifier and training a segmentation network do differently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from ..processes import Processes
from .data import TrainLoader, val_loader
from .evaluate import check_labels, evaluate
from .recipe import Recipe
from .scenes import IGNORED, SceneCrops, SceneSamples, WholeScenes, find_presence, open_scenes
from .score_scenes import evaluate_scenes
from .splits import Location, check_alike, classes_of, open_split
from .transforms import train_transform, val_transform


class Outcome(Protocol):
    """What a validation gives: see `evaluate.Score` and `score_scenes.SceneScore`."""

    @property
    def broken(self) -> list[str]: ...

    def figures(self) -> dict[str, float]:
        """The figures by name; percentages, but for the loss."""

    def details(self) -> dict[str, Any]:
        """More for metrics.json."""

    def shown(self) -> Sequence[np.ndarray]:
        """Pictures for TensorBoard, (H, W, 3) uint8."""


class Task(Protocol):
    """The data, the loss and the counts of a run.

    `counts` are the names of what `count` adds up over training images; the first of `judged` decides which snapshot is
    the best, all of them are said after each epoch.
    """

    @property
    def counts(self) -> tuple[str, ...]: ...
    @property
    def judged(self) -> tuple[str, ...]: ...

    def open(self, recipe: Recipe, where: Location, micro: int) -> tuple[Any, Any, tuple[str, ...] | None]:
        """The two splits, and the names of the classes where known."""

    def loaders(
        self, recipe: Recipe, train: Any, val: Any, out: Path, workers: int, everyone: Processes
    ) -> tuple[TrainLoader, Any]:
        """Batches to train on, and this process's share of those to validate on."""

    def check(self, labels: Tensor, classes: int) -> None:
        """Refuse labels that the network does not have."""

    def at_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits, in float32, where the labels are: what `loss` and `count` take."""

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Cross-entropy, the mean over what counts."""

    def count(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        """What `counts` names, of one batch."""

    def trained(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of training from the sums of `counts` and 'images'."""

    def evaluate(self, network: nn.Module, val: Any, normalize: nn.Module, everyone: Processes) -> Outcome:
        """Score a network on the held-out images."""


def micro_batch(recipe: Recipe, processes: int) -> int:
    """Images that each of so many processes sees at a time."""
    return recipe.optimizer.batch_size // recipe.training.accumulate // processes


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe's network."""
    return Segmentation(recipe) if recipe.task == "segmentation" else Classification(recipe)


class Classification:
    """One class an image."""

    counts = ("right", "right_of_five")
    judged = ("top1", "top5")

    def __init__(self, recipe: Recipe) -> None:
        self.training = recipe.training

    def open(self, recipe: Recipe, where: Location, micro: int) -> tuple[Any, Any, tuple[str, ...] | None]:
        train = open_split(where, where.train_split, True, micro, recipe.training.seed)
        val = open_split(where, where.val_split)
        check_alike(where, train, val)
        return train, val, classes_of(train)

    def loaders(
        self, recipe: Recipe, train: Any, val: Any, out: Path, workers: int, everyone: Processes
    ) -> tuple[TrainLoader, Any]:
        training, images = recipe.training, recipe.input
        loader = TrainLoader(
            train, train_transform(recipe), recipe.optimizer.batch_size, training.accumulate, training.repeats,
            training.seed, workers, everyone,
        )  # fmt: skip
        transform = val_transform(images.scale_val, images.crop_val)
        return loader, val_loader(val, transform, micro_batch(recipe, everyone.count), workers, everyone)

    def check(self, labels: Tensor, classes: int) -> None:
        check_labels(labels, classes)

    def at_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def count(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        hits = logits.topk(min(5, logits.size(1))).indices == labels[:, None]
        return [hits[:, 0].sum(), hits.sum()]

    def trained(self, sums: dict[str, float]) -> dict[str, float]:
        images = max(sums["images"], 1)
        return {"top1": 100 * sums["right"] / images, "top5": 100 * sums["right_of_five"] / images}

    def evaluate(self, network: nn.Module, val: Any, normalize: nn.Module, everyone: Processes) -> Outcome:
        training = self.training
        return evaluate(
            network, val, normalize, everyone, amp=training.amp, channels_last=training.channels_last, text="validation"
        )


class Segmentation:
    """One class a pixel. The logits are scaled to the labels' size, for the loss and for what counts as right."""

    counts = ("right", "pixels")
    judged = ("miou", "accuracy")

    def __init__(self, recipe: Recipe) -> None:
        self.training = recipe.training
        self.classes: tuple[str, ...] | None = None

    def open(self, recipe: Recipe, where: Location, micro: int) -> tuple[Any, Any, tuple[str, ...] | None]:
        train, val = (
            open_scenes(Path(where.root), split, recipe.network.classes, recipe.segmentation.ignore)
            for split in (where.train_split, where.val_split)
        )
        self.classes = train.classes
        return train, val, train.classes

    def loaders(
        self, recipe: Recipe, train: Any, val: Any, out: Path, workers: int, everyone: Processes
    ) -> tuple[TrainLoader, Any]:
        train.uniform = recipe.segmentation.uniform
        if train.uniform > 0:
            train.presence = find_presence(train, out / "presence.npz", workers, everyone)
        loader = TrainLoader(
            train, SceneCrops(recipe), recipe.optimizer.batch_size, recipe.training.accumulate, 1,
            recipe.training.seed, workers, everyone, SceneSamples,
        )  # fmt: skip
        whole = WholeScenes(recipe.segmentation.longest_val)
        return loader, val_loader(val, whole, 1, workers, everyone, SceneSamples)  # their sizes differ

    def check(self, labels: Tensor, classes: int) -> None:
        pass  # each file's were looked at when it was read

    def at_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.interpolate(logits, labels.shape[-2:], mode="bilinear")

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        # Not the mean that torch takes, which is NaN where nothing counts.
        total = F.cross_entropy(
            logits, targets.long(), ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
        )
        return total / (targets != IGNORED).sum().clamp(min=1)

    def count(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        guesses = logits.argmax(1)
        return [(guesses == labels).sum(), (labels != IGNORED).sum()]

    def trained(self, sums: dict[str, float]) -> dict[str, float]:
        return {"accuracy": 100 * sums["right"] / max(sums["pixels"], 1)}

    def evaluate(self, network: nn.Module, val: Any, normalize: nn.Module, everyone: Processes) -> Outcome:
        training = self.training
        return evaluate_scenes(
            network, val, normalize, everyone, classes=self.classes, amp=training.amp,
            channels_last=training.channels_last, text="validation",
        )  # fmt: skip


# Names as people write them.
TITLES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "accuracy": "pixels right", "loss": "loss"}


def spell(figures: dict[str, float], names: Sequence[str]) -> str:
    """'top-1 98.20 %  top-5 …' of the figures of these names."""
    return "  ".join(f"{TITLES[name]} {figures[name]:.2f} %" for name in names)
