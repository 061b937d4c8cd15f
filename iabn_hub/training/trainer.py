"""The training loop: steps, epochs and snapshots.

The random state of each step is derived from (seed, step, rank), and that of each image from (seed, epoch, position).
So a snapshot stores no random state, and a resumed run repeats what an uninterrupted one computes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..datasets.loaders import TrainLoader
from ..datasets.samples import Batch
from ..evaluation import Metrics
from ..recipes import Recipe
from ..world import World, autocast
from .logging import Clock, Row, RunLogger
from .optimisation import LearningRate, build_optimizer
from .snapshots import Snapshots
from .task import Task, format_metrics

SCALAR_STEPS = 50  # steps between two points of TensorBoard's curves


class DivergedError(FloatingPointError):
    """The loss is no longer finite; the message names the step and the way out."""


@dataclass(frozen=True)
class Run:
    """What a trainer works with.

    Args:
        recipe: of the run, with the classes of the data.
        task: what the network is trained for.
        network: without wrappers, on the device of `world`.
        config: timm's configuration of the network, stored in every snapshot.
        loader: training batches.
        normalize: makes float32 input of uint8 images.
        validate: the metrics of a network on the held-out images.
        snapshots: where rank 0 saves the run.
        snapshot_minutes: between two snapshots within an epoch.
        stop_requested: asked at every step; once it is true on any rank, all stop there, with a snapshot.
        on_skipped: called with the reasons why files of a batch were skipped.
    """

    recipe: Recipe
    task: Task
    world: World
    network: nn.Module
    config: dict[str, Any]
    loader: TrainLoader
    normalize: nn.Module
    validate: Callable[[nn.Module], Metrics]
    snapshots: Snapshots
    snapshot_minutes: float
    stop_requested: Callable[[], bool]
    on_skipped: Callable[[tuple[str, ...]], None]


class DelayedReader:
    """A few numbers of each step, read one step later, so that the host does not wait for the device."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: tuple[Tensor, Any] | None = None

    def push(self, numbers: Tensor) -> list[float] | None:
        """Add a vector of this step; returns the sums over all ranks of the step before."""
        self.world.all_reduce(numbers)
        before = self.flush()
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            self.pending = (host, torch.cuda.current_stream().record_event())
        else:
            self.pending = (numbers, None)
        return before

    def flush(self) -> list[float] | None:
        """The sums that have not been returned yet."""
        if self.pending is None:
            return None
        (numbers, event), self.pending = self.pending, None
        if event is not None:
            event.synchronize()
        values: list[float] = numbers.tolist()
        return values


class Trainer:
    """The state of a run: its network, optimizer, position and metrics.

    Args:
        initial_weights: the name of those that the network has; '' if it is randomly initialised.
    """

    def __init__(self, run: Run, initial_weights: str | None = "") -> None:
        self.run = run
        self.initial_weights = initial_weights
        training = run.recipe.training
        if training.channels_last:
            run.network.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(run.recipe, run.network)
        self.rate = LearningRate(run.recipe, run.loader.steps)
        self.scaler = torch.amp.GradScaler(run.world.device.type, enabled=training.amp == "fp16")
        self.ema: Any = None
        if training.ema_decay:
            self.ema = ModelEmaV3(run.network, training.ema_decay, use_warmup=True, warmup_power=1.0)
        self.mixup: Any = None
        if training.mixup or training.cutmix:
            self.mixup = Mixup(
                mixup_alpha=training.mixup,
                cutmix_alpha=training.cutmix,
                label_smoothing=training.label_smoothing,
                num_classes=run.recipe.network.classes,
            )
        self.epoch = self.step = 0  # completed
        self.rows: list[Row] = []
        # Of a step, summed over its images and the ranks; the stop flag is exchanged with them.
        self.numbers = ("loss", *run.task.counts, "images", "stop")
        self.sums = dict.fromkeys(self.numbers, 0.0)  # over the steps of this epoch
        self.details: dict[str, Any] = {}  # of the last validation
        self.seconds_before, self.started = 0.0, time.monotonic()  # of earlier starts, and this one
        self.saved: Path | None = None
        self.last_save = time.monotonic()
        self.reader = DelayedReader(run.world)
        self.stopped = False

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and exported: the moving average of the weights, if there is one."""
        return self.ema.module if self.ema else self.run.network

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as tensors and plain values."""
        return {
            "model": self.run.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": {"epoch": self.epoch, "step": self.step, "steps_per_epoch": self.run.loader.steps},
            "sums": self.sums,
            "rows": self.rows,
            "recipe": self.run.recipe.to_dict(),
            "config": self.run.config,
            "classes": self.run.task.classes,
            "details": self.details,
            "initial_weights": self.initial_weights,
            "seconds": self.seconds(),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a snapshot."""
        self.run.network.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        # Learning rates and weight decays are those of today's recipe, which may have been changed on purpose.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, today in zip(self.optimizer.param_groups, settings):
            group.update(today)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["position"]["epoch"], state["position"]["step"]
        self.sums, self.rows = dict(state["sums"]), list(state["rows"])
        self.details = dict(state.get("details", {}))
        self.initial_weights = state.get("initial_weights")
        self.seconds_before = float(state.get("seconds", 0.0))
        self.saved = path

    def seconds(self) -> float:
        """The time that the run has taken, over all its starts up to their last snapshots."""
        return self.seconds_before + time.monotonic() - self.started

    def fit(self, log: RunLogger) -> None:
        """Train to the last epoch, or until a stop is requested; `stopped` says which.

        Raises:
            DivergedError: the loss is no longer finite.
            DataError, ValueError: the data is not what the recipe needs.
        """
        model = self._wrapped()
        while self.epoch < self.run.recipe.optimizer.schedule.epochs and not self.stopped:
            self.train_epoch(model, log)
            if self.stopped:
                self.saved = self._save(log)
            else:
                self._end_epoch(log)

    def _wrapped(self) -> nn.Module:
        network, world = self.run.network, self.run.world
        model: Any = torch.compile(network) if self.run.recipe.training.compile else network
        if world.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)

    def train_epoch(self, model: nn.Module, log: RunLogger) -> None:
        """The remaining steps of an epoch."""
        run = self.run
        model.train()
        run.normalize.train()
        first = self.step - self.epoch * run.loader.steps
        batches = iter(run.loader.epoch(self.epoch, first))
        self.clock = Clock()
        self.images_before = self.sums["images"]
        for _ in range(first, run.loader.steps):
            numbers = self._step(model, batches)
            self._accumulate(self.reader.push(numbers), self.step, log)
            self.step += 1
            if self.stopped:
                break
            if run.world.is_primary and time.monotonic() - self.last_save > 60 * run.snapshot_minutes:
                self._accumulate(self.reader.flush(), self.step, log)
                self.saved = self._save(log)
        self._accumulate(self.reader.flush(), self.step, log)

    def _step(self, model: Any, batches: Any) -> Tensor:
        """Forward and backward of every micro-batch, and one update; returns this rank's `numbers`."""
        recipe, world = self.run.recipe, self.run.world
        steps = recipe.training.accumulation_steps
        _seed(recipe.training.seed, self.step, world.rank)
        self.rate.set(self.optimizer, self.step)
        numbers = torch.zeros(len(self.numbers), dtype=torch.float64, device=world.device)
        for micro in range(steps):
            delayed = world.size > 1 and micro < steps - 1  # gradients are all-reduced once per optimizer step
            with model.no_sync() if delayed else contextlib.nullcontext():
                numbers[:-1] += self._micro_step(model, self.clock.next(batches))
        if recipe.optimizer.clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.run.network.parameters(), recipe.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.run.network, self.step + 1)
        numbers[-1] = float(self.run.stop_requested())
        return numbers

    def _micro_step(self, model: Any, batch: Batch) -> Tensor:
        """Forward and backward of one micro-batch; returns its loss, counts and images, (V,) float64."""
        task, training, device = self.run.task, self.run.recipe.training, self.run.world.device
        if batch.skipped:
            self.run.on_skipped(batch.skipped)
        task.check_labels(batch.labels, self.run.recipe.network.classes)
        images = self.run.normalize(batch.images.to(device, non_blocking=True))
        labels = targets = batch.labels.to(device, non_blocking=True)
        if training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        smoothing = training.label_smoothing
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
            smoothing = 0.0  # the targets are smoothed already
        with autocast(device, training.amp):
            logits = model(images)
        logits = task.logits_at_labels(logits.float(), labels)
        loss = task.loss(logits, targets, smoothing)
        self.scaler.scale(loss / training.accumulation_steps).backward()
        with torch.no_grad():
            values = [loss * len(labels), *task.count(logits, labels), torch.full_like(loss, len(labels))]
            return torch.stack([value.double() for value in values])

    def _accumulate(self, values: list[float] | None, step: int, log: RunLogger) -> None:
        """Add the numbers of step `step` (counted from 1) to the epoch's, once they are read."""
        if values is None:
            return
        numbers = dict(zip(self.numbers, values))
        if not math.isfinite(numbers["loss"]):
            raise self._diverged(f"the loss is {numbers['loss']} at step {step:,}")
        self.stopped = self.stopped or numbers["stop"] > 0
        for name, value in numbers.items():
            self.sums[name] += value
        loss = numbers["loss"] / numbers["images"]
        log.progress(int(numbers["images"]), self.epoch + 1, loss)
        if step % SCALAR_STEPS == 0:
            metrics = {f"train/{name}": value for name, value in self.run.task.train_metrics(numbers).items()}
            rate = self.optimizer.param_groups[0]["lr"]
            log.scalars({"train/loss": loss, **metrics, "train/learning_rate": rate}, step)

    def _diverged(self, what: str) -> DivergedError:
        saved = f"The last good snapshot is {self.saved}" if self.saved else "There is no snapshot yet"
        return DivergedError(
            f"{what} (epoch {self.epoch + 1}). {saved}: resume from it, or start again, with a lower learning rate "
            "(--set optimizer.learning_rate=…) or gradient clipping (--set optimizer.clip=1)"
        )

    def _end_epoch(self, log: RunLogger) -> None:
        task, sums = self.run.task, self.sums
        seconds = self.clock.seconds()
        rate = self.rate.set(self.optimizer, self.step - 1)
        self.run.world.broadcast_buffers(self.evaluated)
        metrics = self.run.validate(self.evaluated)
        self.details = metrics.details()
        values = metrics.values()
        row: Row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "learning_rate": rate,
            "loss": sums["loss"] / max(sums["images"], 1),
            **task.train_metrics(sums),
            **{f"val_{name}": value for name, value in values.items()},
            "images_per_second": (sums["images"] - self.images_before) / seconds,
            "waited": 100 * self.clock.waited / seconds,
            "peak_memory": log.peak_memory(),
        }
        monitor = f"val_{task.monitors[0]}"
        is_best = all(row[monitor] > earlier[monitor] for earlier in self.rows)
        self.rows.append(row)
        self.epoch += 1
        self.sums = dict.fromkeys(self.numbers, 0.0)
        log.epochs(self.rows)
        log.scalars({f"epoch/{name}": row[name] for name in row.keys() - {"epoch", "step"}}, self.step)
        log.pictures(metrics.pictures(), self.step)
        log.info(
            f"epoch {self.epoch}/{self.run.recipe.optimizer.schedule.epochs}  loss {row['loss']:.4f}  "
            f"{format_metrics(values, task.monitors)}  {row['images_per_second']:.0f} images/s, "
            f"{row['waited']:.1f} % of the time waiting for data"
        )
        self.saved = self._save(log, is_best)

    def _save(self, log: RunLogger, best: bool = False) -> Path | None:
        self.last_save = time.monotonic()
        log.flush()
        if not self.run.world.is_primary:
            return None
        values = [value for value in self.run.network.state_dict().values() if value.is_floating_point()]
        if not all(value.isfinite().all() for value in values):  # the loss shows it only a step later
            raise self._diverged(f"the weights are no longer finite after step {self.step:,}")
        return self.run.snapshots.save(self.state(), self.step, best)


def _seed(seed: int, step: int, rank: int) -> None:
    mixed = (seed * 1_000_003 + step) * 4099 + rank
    torch.manual_seed(mixed % (1 << 63))
    np.random.seed(mixed % (1 << 32))  # timm's Mixup uses numpy's generator
