"""One model through its epochs, and what it gets right."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """SGD with Nesterov momentum 0.9; the rate climbs for a fifth of the steps and falls as a cosine."""

    epochs: int
    learning_rate: float
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Score:
    """Percentages of images whose class is the first guess, or among the first five; and the mean loss."""

    top1: float
    top5: float
    loss: float
    images: int


def train(
    model: nn.Module, batches: Iterable[Any], steps_per_epoch: int, schedule: Schedule, device: torch.device
) -> Iterator[dict[str, float]]:
    """Train `model` in place; yields one row per epoch: epoch, mean loss, images per second.

    Raises:
        FloatingPointError: the loss is no longer finite; says at which step.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), schedule.learning_rate, momentum=0.9, weight_decay=schedule.weight_decay, nesterov=True
    )
    steps = schedule.epochs * steps_per_epoch
    scheduler = OneCycleLR(optimizer, schedule.learning_rate, steps, pct_start=0.2, cycle_momentum=False)
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for epoch in range(1, schedule.epochs + 1):
            model.train()
            started, seen, total = time.perf_counter(), 0, 0.0
            for images, labels in batches:
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {bar.n + 1}: try a lower learning rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                scheduler.step()
                seen += len(labels)
                total += value * len(labels)
                bar.update()
                bar.set_postfix(epoch=epoch, loss=f"{value:.3f}", refresh=False)
            yield {"epoch": epoch, "loss": total / seen, "images_per_second": seen / (time.perf_counter() - started)}


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Score:
    """Score `model` in eval mode on every image of `batches`."""
    model.eval()
    top1 = top5 = images = 0
    loss = 0.0
    with torch.inference_mode():
        for inputs, labels in batches:
            target = labels.to(device)
            logits = model(inputs.to(device)).float()
            guesses = logits.topk(min(5, logits.size(1))).indices == target[:, None]
            top1 += int(guesses[:, 0].sum())
            top5 += int(guesses.any(1).sum())
            loss += float(F.cross_entropy(logits, target, reduction="sum"))
            images += len(target)
    return Score(100 * top1 / images, 100 * top5 / images, loss / images, images)
