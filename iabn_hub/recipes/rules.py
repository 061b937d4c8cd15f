"""What a valid recipe must satisfy beyond the types of its fields: the fields that depend on each other."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..checkpoints.catalogue import suggest
from ..models.factory import CONVERTED_MODELS, MODELS
from ..schema import Integer, parse, record_class
from .schema import Recipe, RecipeError, SegmentationSection, TrainingSection

_logger = logging.getLogger(__name__)
Refuse = Callable[[str], RecipeError]
CLASSIFICATION_ONLY = ("mixup", "cutmix", "augment", "erase", "repeats", "min_scale")


def check_recipe(recipe: Recipe, refuse: Refuse) -> None:
    """Refuse settings that are valid one by one and cannot work together.

    Args:
        refuse: makes the exception of a sentence.
    """
    for rule in (_network, _optimizer, _schedule, _warmup, _sizes, _segmentation):
        rule(recipe, refuse)


def _network(recipe: Recipe, refuse: Refuse) -> None:
    network = recipe.network
    if recipe.model not in MODELS:
        known = sorted({name.rpartition("_")[0] for name in MODELS})
        hint = suggest(network.arch, known)
        raise refuse(f"network.arch is {network.arch!r}, which is not an architecture{hint}")
    if recipe.model in CONVERTED_MODELS and network.bn_mode != "standard":
        raise refuse(f"network.bn_mode is {network.bn_mode}: {recipe.model} has converted norms, use standard")
    if network.dilation != 1:
        raise refuse(f"network.dilation is {network.dilation}: only networks with dilation 1 are trained")
    if network.input_3x3 and not recipe.has_stem:  # so did the earlier package
        _logger.warning("network.input_3x3 is ignored: %s has only one kind of stem", network.arch)
    if network.activation == "relu" and network.bn_mode != "standard":
        raise refuse(
            f"network.activation relu cannot be inverted, which network.bn_mode {network.bn_mode} needs; "
            "use leaky_relu, elu or identity, or bn_mode standard"
        )


def _optimizer(recipe: Recipe, refuse: Refuse) -> None:
    optimizer, steps = recipe.optimizer, recipe.training.accumulation_steps
    if optimizer.nesterov and (optimizer.type != "SGD" or optimizer.momentum == 0):
        raise refuse("optimizer.nesterov needs type SGD and a momentum above 0")
    if steps > optimizer.batch_size:
        raise refuse(
            f"training.accumulation_steps is {steps}, more than optimizer.batch_size, which is {optimizer.batch_size}"
        )


@record_class
class _Constant:
    """No parameters."""


@record_class
class _Step:
    """gamma^⌊epoch/step_size⌋"""

    step_size: Integer
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.step_size < 1:
            raise ValueError(f"step_size is {self.step_size}: must be 1 or more")


@record_class
class _Multistep:
    """gamma to the number of milestones passed"""

    milestones: tuple[Integer, ...]
    gamma: float = 0.1


@record_class
class _Exponential:
    """gamma^epoch"""

    gamma: float = 0.1


@record_class
class _Linear:
    """alpha·epoch + beta"""

    alpha: float
    beta: float


@record_class
class _Poly:
    """(1 − epoch/epochs)^power"""

    power: float = 0.9

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"power is {self.power}: must be above 0")


# The parameters of each schedule; with mode 'step', 'epoch' counts steps. Cosine is (1 + cos(π·epoch/epochs))/2.
SCHEDULES = {
    "constant": _Constant,
    "step": _Step,
    "multistep": _Multistep,
    "exponential": _Exponential,
    "linear": _Linear,
    "cosine": _Constant,
    "poly": _Poly,
}


def _schedule(recipe: Recipe, refuse: Refuse) -> None:
    schedule = recipe.optimizer.schedule
    parameters = SCHEDULES[schedule.type]
    if parameters is _Constant and schedule.params:
        raise refuse(f"optimizer.schedule.params: a schedule of type {schedule.type} has none")
    parse(
        parameters, schedule.params, lambda sentence: refuse(f"optimizer.schedule.params ({schedule.type}): {sentence}")
    )


def _warmup(recipe: Recipe, refuse: Refuse) -> None:
    warmup, epochs = recipe.training.warmup_epochs, recipe.optimizer.schedule.epochs
    if warmup >= epochs:
        raise refuse(
            f"training.warmup_epochs is {warmup}, but the run has only {epochs} epochs: train longer, or shorten the "
            "warm-up (--set training.warmup_epochs=0)"
        )


def _sizes(recipe: Recipe, refuse: Refuse) -> None:
    images = recipe.input
    pairs = (("train", images.scale_train, images.crop_train), ("val", images.scale_val, images.crop_val))
    for key, size, crop in pairs:
        if 0 < size < crop and recipe.task == "classification":
            raise refuse(f"input.scale_{key} is {size}, less than input.crop_{key}, which is {crop}")


def _segmentation(recipe: Recipe, refuse: Refuse) -> None:
    section = recipe.segmentation
    if recipe.task == "classification":
        if section != SegmentationSection():
            raise refuse(f"the section segmentation: {recipe.network.arch} is a classifier")
        return
    if section.min_scale > section.max_scale:
        raise refuse(
            f"segmentation.min_scale is {section.min_scale}, more than segmentation.max_scale, {section.max_scale}"
        )
    defaults = TrainingSection()
    for name in CLASSIFICATION_ONLY:
        value = getattr(recipe.training, name)
        if value != getattr(defaults, name):
            instead = "; set segmentation.min_scale" if name == "min_scale" else ""
            raise refuse(f"training.{name} is {value}: that is for classification only{instead}")
