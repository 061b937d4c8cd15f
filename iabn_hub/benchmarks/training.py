"""Time the training loop beside a bare loop: forward, backward and step on one batch in memory.

Both train the recipe's network in turn, some steps each round. Results are medians over the rounds, and medians of the
rounds' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..datasets.folders import Location, classes_of, open_split
from ..datasets.loaders import BatchPlan, TrainLoader
from ..datasets.samples import samples_of
from ..datasets.transforms import Normalize, train_transform
from ..recipes import Recipe, find_recipe, read_recipe
from ..training.network import build_network
from ..training.optimisation import build_optimizer
from ..training.snapshots import Snapshots
from ..training.task import make_task
from ..training.trainer import Run, Trainer
from ..world import World, autocast
from .machine import describe_machine


@dataclass(frozen=True)
class TrainingOptions:
    """What to measure; `changes` are made to the recipe, `steps` are those of a round."""

    recipe: str
    data: str
    changes: tuple[str, ...] = ()
    workers: int = 2
    cache_images: bool = False
    steps: int = 20
    rounds: int = 7


class _NoLog:
    """Stands for the log of a run."""

    def progress(self, images: int, epoch: int, loss: float) -> None:
        pass

    def scalars(self, values: Any, step: int) -> None:
        pass


def measure_training(options: TrainingOptions, world: World) -> dict[str, Any]:
    """Images per second of both loops, and their ratio, ready for JSON."""
    path = find_recipe(options.recipe)
    location = Location(options.data)
    classes = len(classes_of(open_split(location, "train", True)) or ())
    changes = [*options.changes, "training.accumulation_steps=1", f"network.classes={classes}"]
    recipe = read_recipe(path, changes)
    trainer = _trainer(recipe, location, options, world)
    steps = trainer.run.loader.steps
    bare_step = _bare_step(recipe, world.device)

    def loop_seconds() -> float:
        trainer.epoch = trainer.step = 0
        started = time.perf_counter()
        trainer.train_epoch(trainer.run.network, _NoLog())  # type: ignore[arg-type]
        return time.perf_counter() - started

    def bare_seconds() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            bare_step()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    rounds = []
    for number in range(options.rounds + 1):
        loop, bare = (loop_seconds(), bare_seconds()) if number % 2 else reversed((bare_seconds(), loop_seconds()))
        if number:  # the first warms up
            rounds.append((loop, bare, trainer.clock.waited / loop))
    images = recipe.optimizer.batch_size * steps
    return {
        "machine": describe_machine(world.device.type), "recipe": path.stem, "network": recipe.model,
        "batch": recipe.optimizer.batch_size, "crop": recipe.input.crop_train, "workers": options.workers,
        "steps": steps, "rounds": options.rounds,
        "loop_images_per_second": images / statistics.median(loop for loop, _, _ in rounds),
        "bare_images_per_second": images / statistics.median(bare for _, bare, _ in rounds),
        "loop_to_bare": statistics.median(bare / loop for loop, bare, _ in rounds),
        "waiting": statistics.median(waited for _, _, waited in rounds),
    }  # fmt: skip


def _trainer(recipe: Recipe, location: Location, options: TrainingOptions, world: World) -> Trainer:
    source = open_split(location, "train", True)
    samples = samples_of(source, train_transform(recipe), world, training=True)
    if options.cache_images:
        samples.keep_decoded(recipe.input.scale_train)
    loader = TrainLoader(samples, BatchPlan(recipe.optimizer.batch_size), options.workers, world)
    loader.steps = min(loader.steps, options.steps)
    images = recipe.input

    def validate(network: Any) -> Any:
        raise NotImplementedError("a benchmark does not validate")

    run = Run(
        recipe=recipe, task=make_task(recipe, location, world), world=world,
        network=build_network(recipe).to(world.device), config={}, loader=loader,
        normalize=Normalize(images.mean, images.std, images.lighting_train).to(world.device), validate=validate,
        snapshots=Snapshots(Path(), 1), snapshot_minutes=1e9, stop_requested=lambda: False, on_skipped=print,
    )  # fmt: skip
    return Trainer(run)


def _bare_step(recipe: Recipe, device: torch.device) -> Callable[[], None]:
    """A function that makes one step of the recipe's network on one batch in memory."""
    size, training = recipe.input.crop_train, recipe.training
    form = torch.channels_last if training.channels_last else torch.contiguous_format
    network = build_network(recipe).to(device, memory_format=form).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(recipe, network)
    images = torch.randn(recipe.optimizer.batch_size, 3, size, size, device=device).to(memory_format=form)
    labels = torch.randint(recipe.network.classes, (len(images),), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, training.amp):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step
