"""Batches for training and validation, shared among ranks and workers.

Every rank shuffles an epoch alike, cuts it into batches, and takes its share of each.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ..world import World
from .folders import DataError
from .samples import SUBSTITUTES, Batch, Key, Samples, Stream, collate

WORKER_NICENESS = 19  # of workers that share the cores with the network: they run when its threads are idle


@dataclass(frozen=True)
class BatchPlan:
    """How the images of an epoch become optimizer steps.

    Args:
        batch_size: images of one optimizer step, over all ranks and accumulation steps.
        accumulation_steps: forward and backward passes per optimizer step.
        repeats: how often an image occurs in a row of an epoch, each time with another crop (Hoffer et al., 2020).
        seed: of the order.
    """

    batch_size: int
    accumulation_steps: int = 1
    repeats: int = 1
    seed: int = 0


class TrainSampler(Sampler[list[Key]]):
    """The keys of one epoch, a micro-batch at a time, for this rank; an incomplete last batch is dropped."""

    def __init__(self, samples: Samples, plan: BatchPlan, world: World) -> None:
        self.samples, self.plan, self.world = samples, plan, world
        self.images = len(samples)
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return (self.images // self.plan.batch_size - self.first_step) * self.plan.accumulation_steps

    def __iter__(self) -> Iterator[list[Key]]:
        size, steps = self.plan.batch_size, self.plan.accumulation_steps
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.epoch)
        order = [each for each in self.samples.order(generator) for _ in range(self.plan.repeats)]
        micro = size // steps
        for first in range(self.first_step * size, self.images - size + 1, size):
            for start in range(first, first + size, micro):
                mine = range(start + self.world.rank, start + micro, self.world.size)
                yield [Key(self.epoch, position, *order[position]) for position in mine]


def loader_options(workers: int, world: World) -> dict[str, Any]:
    """Arguments of every DataLoader."""
    return {
        "num_workers": workers,
        "collate_fn": collate,
        "worker_init_fn": _start_nice_worker if world.device.type == "cpu" else start_worker,
        "pin_memory": world.device.type == "cuda",
    }


def start_worker(_: int) -> None:
    """Let the main process decide what SIGINT and SIGTERM end: they reach the workers too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # a worker that hangs ends after 30 seconds


def _start_nice_worker(number: int) -> None:
    start_worker(number)
    os.nice(WORKER_NICENESS)


class TrainLoader:
    """The training batches of any epoch, from any step on.

    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(self, samples: Samples | Stream, plan: BatchPlan, workers: int, world: World) -> None:
        self.images, self.plan = len(samples), plan
        self.steps = self.images // plan.batch_size
        if self.steps == 0:
            raise DataError(
                f"there are {self.images} training images, fewer than one batch of {plan.batch_size}: pass a smaller "
                "--batch-size"
            )
        self.micro_batch = plan.batch_size // plan.accumulation_steps // world.size
        self.order = torch.Generator()  # of the loader alone: the caller's random state is left as it is
        self.stream = samples if isinstance(samples, Stream) else None
        if self.stream is not None:
            workers = max(
                workers, 1
            )  # workers start anew with each epoch, where a reader in this process keeps its state
            self.stream.source.set_loader_cfg(workers)
            options = loader_options(workers, world)
            self.loader = DataLoader(self.stream, self.micro_batch, drop_last=True, generator=self.order, **options)
        else:
            assert isinstance(samples, Samples)
            self.sampler = TrainSampler(samples, plan, world)
            self.loader = DataLoader(
                samples,
                batch_sampler=self.sampler,
                generator=self.order,
                persistent_workers=workers > 0,
                **loader_options(workers, world),
            )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The micro-batches from `first_step` on. Earlier ones of a stream are read and dropped.

        Raises:
            DataError: too many images in a row cannot be read; a stream is shorter than it should be.
        """
        if self.stream is not None:
            yield from self._epoch_of(self.stream, epoch, first_step)
            return
        self.sampler.epoch, self.sampler.first_step = epoch, first_step
        for batch in self.loader:
            if len(batch.labels) < self.micro_batch:
                raise DataError(f"{SUBSTITUTES} images in a row cannot be read; the last one: {batch.skipped[-1]}")
            yield batch

    def _epoch_of(self, stream: Stream, epoch: int, first_step: int) -> Iterator[Batch]:
        stream.epoch = epoch
        stream.source.set_epoch(epoch)
        self.order.manual_seed(self.plan.seed * 1_000_003 + epoch)
        accumulation_steps = self.plan.accumulation_steps
        needed, given = self.steps * accumulation_steps, 0
        for given, batch in enumerate(self.loader, start=1):
            if given > first_step * accumulation_steps:
                yield batch
            if given == needed:
                return
        raise DataError(
            f"the stream ended after {given // accumulation_steps} of {self.steps} steps: state its number of images "
            "with --train-samples"
        )


def val_loader(samples: Samples | Stream, batch_size: int, workers: int, world: World) -> Any:
    """A loader of this rank's share of the images; each image occurs once over all ranks."""
    options = {**loader_options(workers, world), "generator": torch.Generator()}
    if isinstance(samples, Stream):
        samples.source.set_loader_cfg(workers)
        return DataLoader(samples, batch_size, **options)
    mine = [Key(0, i, i) for i in range(world.rank, len(samples), world.size)]
    return DataLoader(samples, batch_size, sampler=mine, persistent_workers=workers > 0, **options)
