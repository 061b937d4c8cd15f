"""One pass of a network over held-out images, on any number of ranks, whatever its metrics are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .datasets.samples import Batch
from .terminal import progress_bar
from .world import World, autocast


@dataclass(frozen=True)
class Runtime:
    """How a network runs, without effect on what it computes beyond rounding.

    Args:
        amp: 'off', 'bf16' or 'fp16'.
        channels_last: memory format of the images and the weights.
    """

    amp: str = "off"
    channels_last: bool = False


class Metrics(Protocol):
    """What is accumulated over held-out images: see `ClassificationMetrics` and `SegmentationMetrics`."""

    images: int
    seconds: float
    skipped: list[str]

    def update(self, network: nn.Module, images: Tensor, batch: Batch) -> None:
        """Accumulate one batch; `images` are normalised and on the network's device."""

    def synchronized(self, world: World) -> Metrics:
        """The metrics over the images of all ranks; equal on every rank."""

    def values(self) -> dict[str, float]:
        """The metrics by name: percentages, and the loss."""

    def details(self) -> dict[str, Any]:
        """Further entries of metrics.json."""

    def pictures(self) -> Sequence[np.ndarray]:
        """Pictures for TensorBoard, (H, W, 3) uint8."""


M = TypeVar("M", bound=Metrics)


def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    normalize: nn.Module,
    world: World,
    metrics: M,
    runtime: Runtime = Runtime(),
    description: str = "",
) -> M:
    """Evaluate `network` in eval mode on this rank's `batches`, and merge the metrics of all ranks.

    Args:
        normalize: makes float32 input of uint8 images, see `datasets.transforms.Normalize`.
        metrics: new; accumulated into.
        description: of the progress bar; without it there is none.

    Returns:
        The metrics over the images of all ranks.

    Raises:
        ValueError: a label is not one of the network's classes.
    """
    was_training = network.training
    network.eval()
    normalize.eval()
    started = time.perf_counter()
    total = len(batches) if isinstance(batches, Sized) else None
    shown = bool(description) and world.is_primary
    with torch.inference_mode():
        for batch in progress_bar(batches, description, shown, total=total, unit="batch", leave=False):
            metrics.skipped += batch.skipped
            if len(batch.labels) == 0:
                continue
            images = normalize(batch.images.to(world.device, non_blocking=True))
            if runtime.channels_last and images.dim() == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast(world.device, runtime.amp):
                metrics.update(network, images, batch)
    metrics.seconds = time.perf_counter() - started
    network.train(was_training)
    merged: Any = metrics.synchronized(world)
    result: M = merged
    return result
