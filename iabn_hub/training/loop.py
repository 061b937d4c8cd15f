"""One run: its steps, its epochs, and its snapshots.

All that is random in a step follows from the recipe's seed and the number of the step, and all that is random in an
image from seed, epoch and position. So a snapshot needs no random states, and a run that goes on from one ends where it
would have ended.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..processes import Processes, autocast
from .data import Batch, TrainLoader
from .journal import Clock, Journal, Row
from .network import LearningRate, build_optimizer
from .recipe import Recipe
from .snapshots import Snapshots
from .tasks import Outcome, Task, spell

BOARD_EVERY = 50  # steps from one point of TensorBoard's curves to the next


class DivergedError(FloatingPointError):
    """The loss is no longer finite; the message names the step and the way out."""


class Readout:
    """A few numbers of each step, handed out one step later, so that nobody waits for the device."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.waiting: tuple[Tensor, Any] | None = None

    def push(self, numbers: Tensor) -> list[float] | None:
        """Take this step's numbers, a vector; gives the sums over all processes of the step before."""
        self.processes.add(numbers)
        before = self.flush()
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            self.waiting = (host, torch.cuda.current_stream().record_event())
        else:
            self.waiting = (numbers, None)
        return before

    def flush(self) -> list[float] | None:
        """The numbers that still wait."""
        if self.waiting is None:
            return None
        (numbers, event), self.waiting = self.waiting, None
        if event is not None:
            event.synchronize()
        values: list[float] = numbers.tolist()
        return values


class Trainer:
    """A network on its way through a recipe.

    Args:
        network: without wrappers, on the device of `processes`.
        validate: scores a network on the held-out images.
        snapshots: where the first process saves the run.
        minutes: between two snapshots within an epoch.
        stop: asked at every step; once it is true on any process, all stop there, with a snapshot.
        on_broken: told of every file that cannot be read.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        network: nn.Module,
        loader: TrainLoader,
        normalize: nn.Module,
        validate: Callable[[nn.Module], Outcome],
        processes: Processes,
        snapshots: Snapshots,
        minutes: float,
        stop: Callable[[], bool],
        on_broken: Callable[[tuple[str, ...]], None],
    ) -> None:
        self.recipe, self.task, self.network, self.loader, self.normalize = recipe, task, network, loader, normalize
        self.validate, self.processes, self.snapshots, self.minutes = validate, processes, snapshots, minutes
        self.stop, self.on_broken = stop, on_broken
        training = recipe.training
        if training.channels_last:
            network.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(recipe, network)
        self.rate = LearningRate(recipe, loader.steps)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=training.amp == "fp16")
        self.ema = (
            ModelEmaV3(network, training.ema_decay, use_warmup=True, warmup_power=1.0) if training.ema_decay else None
        )
        self.mixup: Any = None
        if training.mixup or training.cutmix:
            self.mixup = Mixup(
                mixup_alpha=training.mixup,
                cutmix_alpha=training.cutmix,
                label_smoothing=training.label_smoothing,
                num_classes=recipe.network.classes,
            )
        self.classes: tuple[str, ...] | None = None  # their names, for the snapshots
        self.epoch = self.step = 0  # whole epochs and whole steps so far
        self.rows: list[Row] = []
        self.numbers = ("loss", *task.counts, "images", "stop")  # of a step, summed over its images and the processes
        self.sums = dict.fromkeys(self.numbers, 0.0)  # over the steps of this epoch
        self.details: dict[str, Any] = {}  # of the last validation
        self.saved: Path | None = None
        self.last_save = time.monotonic()
        self.readout = Readout(processes)
        self.stopped = False

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and exported: the average of the weights where the recipe keeps one."""
        return self.ema.module if self.ema else self.network

    def state(self) -> dict[str, Any]:
        """All that a snapshot holds: tensors and plain values."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": {"epoch": self.epoch, "step": self.step, "steps_per_epoch": self.loader.steps},
            "sums": dict(self.sums),
            "rows": [dict(row) for row in self.rows],
            "recipe": asdict(self.recipe),
            "classes": self.classes,
            "details": self.details,
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a snapshot."""
        self.network.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        # Rates and decays are the recipe's of today, which may have been changed on purpose.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, today in zip(self.optimizer.param_groups, settings):
            group.update(today)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["position"]["epoch"], state["position"]["step"]
        self.sums, self.rows = dict(state["sums"]), list(state["rows"])
        self.details = dict(state.get("details", {}))  # earlier snapshots had none
        self.saved = path

    def run(self, journal: Journal) -> None:
        """Train to the last epoch, or until `stop`; `stopped` says which.

        Raises:
            DivergedError: the loss is no longer finite.
            DataError, ValueError: the data is not what the recipe needs.
        """
        model = self._wrapped()
        while self.epoch < self.recipe.optimizer.schedule.epochs and not self.stopped:
            self.train_epoch(model, journal)
            if self.stopped:
                self.saved = self._save(journal)
            else:
                self._end_epoch(journal)

    def _wrapped(self) -> nn.Module:
        model: Any = torch.compile(self.network) if self.recipe.training.compile else self.network
        if self.processes.count == 1:
            return model
        device = self.processes.device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def train_epoch(self, model: nn.Module, journal: Journal) -> None:
        """The steps of an epoch that are still to do."""
        model.train()
        self.normalize.train()
        first = self.step - self.epoch * self.loader.steps
        batches = iter(self.loader.epoch(self.epoch, first))
        self.clock = Clock()
        self.images_before = self.sums["images"]
        for _ in range(first, self.loader.steps):
            numbers = self._step(model, batches)
            self._read(self.readout.push(numbers), self.step, journal)
            self.step += 1
            if self.stopped:
                break
            if self.processes.first and time.monotonic() - self.last_save > 60 * self.minutes:
                self._read(self.readout.flush(), self.step, journal)
                self.saved = self._save(journal)
        self._read(self.readout.flush(), self.step, journal)

    def _step(self, model: Any, batches: Any) -> Tensor:
        """Forward and backward of every micro-batch, and one update; returns this process's `numbers`."""
        training, device = self.recipe.training, self.processes.device
        _seed(training.seed, self.step, self.processes.rank)
        self.rate.set(self.optimizer, self.step)
        numbers = torch.zeros(len(self.numbers), dtype=torch.float64, device=device)
        for micro in range(training.accumulate):
            batch: Batch = self.clock.next(batches)
            if batch.broken:
                self.on_broken(batch.broken)
            self.task.check(batch.labels, self.recipe.network.classes)
            images = self.normalize(batch.images.to(device, non_blocking=True))
            labels = targets = batch.labels.to(device, non_blocking=True)
            if training.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            smoothing = training.label_smoothing
            if self.mixup is not None:
                images, targets = self.mixup(images, labels)
                smoothing = 0.0  # it is in the targets already
            last = micro == training.accumulate - 1
            kept_back = self.processes.count > 1 and not last  # gradients are exchanged once a step
            with model.no_sync() if kept_back else contextlib.nullcontext():
                with autocast(device, training.amp):
                    logits = model(images)
                logits = self.task.at_labels(logits.float(), labels)
                loss = self.task.loss(logits, targets, smoothing)
                self.scaler.scale(loss / training.accumulate).backward()
            with torch.no_grad():
                counts = [loss * len(labels), *self.task.count(logits, labels)]
                numbers[:-2] += torch.stack([count.double() for count in counts])
            numbers[-2] += len(labels)
        clip = self.recipe.optimizer.clip
        if clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.network, self.step + 1)
        numbers[-1] = float(self.stop())
        return numbers

    def _read(self, values: list[float] | None, step: int, journal: Journal) -> None:
        """What the numbers of step `step` (counted from 1) say, now that they are there."""
        if values is None:
            return
        numbers = dict(zip(self.numbers, values))
        if not math.isfinite(numbers["loss"]):
            raise self._diverged(f"the loss is {numbers['loss']} at step {step:,}")
        self.stopped = self.stopped or numbers["stop"] > 0
        for name, value in numbers.items():
            self.sums[name] += value
        loss = numbers["loss"] / numbers["images"]
        journal.progress(int(numbers["images"]), self.epoch + 1, loss)
        if step % BOARD_EVERY == 0:
            journal.scalars(
                {
                    "train/loss": loss,
                    **{f"train/{name}": value for name, value in self.task.trained(numbers).items()},
                    "train/learning_rate": self.optimizer.param_groups[0]["lr"],
                },
                step,
            )

    def _diverged(self, what: str) -> DivergedError:
        saved = f"The last good snapshot is {self.saved}" if self.saved else "There is no snapshot yet"
        return DivergedError(
            f"{what} (epoch {self.epoch + 1}). {saved}: go on from it, or begin anew, with a lower learning rate "
            "(--set optimizer.learning_rate=…) or gradient clipping (--set optimizer.clip=1)"
        )

    def _end_epoch(self, journal: Journal) -> None:
        seconds = self.clock.seconds()
        rate = self.rate.set(self.optimizer, self.step - 1)
        self.processes.share_buffers(self.judged)
        score = self.validate(self.judged)
        self.details = score.details()
        figures = score.figures()
        sums = self.sums
        row: Row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "learning_rate": rate,
            "loss": sums["loss"] / max(sums["images"], 1),
            **self.task.trained(sums),
            **{f"val_{name}": value for name, value in figures.items()},
            "images_per_second": (sums["images"] - self.images_before) / seconds,
            "waited": 100 * self.clock.waited / seconds,
            "peak_memory": journal.peak_memory(),
        }
        judged = f"val_{self.task.judged[0]}"
        is_best = all(row[judged] > earlier[judged] for earlier in self.rows)
        self.rows.append(row)
        self.epoch += 1
        self.sums = dict.fromkeys(self.numbers, 0.0)
        journal.epochs(self.rows)
        journal.scalars({f"epoch/{name}": row[name] for name in row.keys() - {"epoch", "step"}}, self.step)
        journal.pictures(score.shown(), self.step)
        journal.say(
            f"epoch {self.epoch}/{self.recipe.optimizer.schedule.epochs}  loss {row['loss']:.4f}  "
            f"{spell(figures, self.task.judged)}  {row['images_per_second']:.0f} images/s, "
            f"{row['waited']:.1f} % of the time waiting for them"
        )
        self.saved = self._save(journal, is_best)

    def _save(self, journal: Journal, best: bool = False) -> Path | None:
        self.last_save = time.monotonic()
        journal.flush()
        if not self.processes.first:
            return None
        values = [value for value in self.network.state_dict().values() if value.is_floating_point()]
        if not all(value.isfinite().all() for value in values):  # the loss would tell a step later
            raise self._diverged(f"the weights are no longer finite after step {self.step:,}")
        return self.snapshots.save(self.state(), self.step, best)


def _seed(seed: int, step: int, rank: int) -> None:
    mixed = (seed * 1_000_003 + step) * 4099 + rank
    torch.manual_seed(mixed % (1 << 63))
    np.random.seed(mixed % (1 << 32))  # timm's Mixup draws from numpy
