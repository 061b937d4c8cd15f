"""The optimizer of a recipe, and its learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..models.state_dict import CLASSIFIERS
from ..recipes import Recipe, RecipeError


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or Adam, with groups for the classifier's own learning rate and for parameters without weight decay."""
    section = recipe.optimizer
    # The same groups whatever their settings, so that a run can be resumed with others.
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name.startswith(CLASSIFIERS), parameter.dim() > 1), []).append(parameter)
    parameters = []
    for (of_classifier, is_weight), members in groups.items():
        rate = section.classifier_lr if of_classifier and section.classifier_lr != -1 else section.learning_rate
        decay = section.weight_decay if is_weight or recipe.training.decay_norms else 0.0
        parameters.append({"params": members, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    if section.type == "Adam":
        return torch.optim.Adam(parameters)
    return torch.optim.SGD(parameters, momentum=section.momentum, nesterov=section.nesterov)


class LearningRate:
    """The learning rate of every step, a function of the recipe and the step alone.

    Args:
        steps_per_epoch: of the run.

    Raises:
        RecipeError: the schedule falls to zero before the last epoch.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.schedule, self.training = recipe.optimizer.schedule, recipe.training
        self.steps_per_epoch = steps_per_epoch
        # The published linear schedule ends some hundred steps below zero: there the rate is 0.
        late = (self.schedule.epochs - 1) * steps_per_epoch
        if self.factor(late) == 0:
            raise RecipeError(
                f"optimizer.schedule: the learning rate falls to 0 before step {late:,}, where the last epoch begins: "
                "change its params, or the number of epochs"
            )

    def factor(self, step: int) -> float:
        """The factor of the recipe's learning rate at this step, counted from 0."""
        kind, params, training = self.schedule.type, self.schedule.params, self.training
        by_step = self.schedule.mode == "step"
        at = step if by_step else step // self.steps_per_epoch
        unit = self.steps_per_epoch if by_step else 1
        gamma = params.get("gamma", 0.1)
        factor = 1.0
        if kind == "step":
            factor = gamma ** (at // params["step_size"])
        elif kind == "multistep":
            factor = gamma ** sum(at >= milestone for milestone in params["milestones"])
        elif kind == "exponential":
            factor = gamma**at
        elif kind == "linear":
            factor = params["alpha"] * at + params["beta"]
        elif kind == "cosine":
            warm = training.warmup_epochs * unit
            part = max(at - warm, 0) / (self.schedule.epochs * unit - warm)
            factor = (1 + math.cos(math.pi * part)) / 2
        elif kind == "poly":
            factor = max(1 - at / (self.schedule.epochs * unit), 0.0) ** params.get("power", 0.9)
        warm_steps = training.warmup_epochs * self.steps_per_epoch
        if step < warm_steps:
            factor *= training.warmup_factor + (1 - training.warmup_factor) * step / warm_steps
        return max(factor, 0.0)

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rates of this step; returns that of the first group."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        rate: Any = optimizer.param_groups[0]["lr"]
        return float(rate)
