"""Recipes: how a published network was trained, as a JSON file that is checked before anything is loaded.

The sections `network`, `optimizer` (with `schedule`) and `input` have the layout of the configuration files of the
package inplace_abn, so that those are accepted as they are; what is new stands in the optional sections `training` and
`segmentation`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.catalogue import suggest
from ..models import MODELS, SEGMENTERS

NORM_LAYERS = {"standard": "abn", "inplace": "iabn", "sync": "iabn_sync"}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key, the value and what is possible."""


@dataclass(frozen=True)
class NetworkSection:
    """The architecture and how its weights begin; xavier and orthogonal use the activation's gain."""

    arch: str = "resnet101"
    activation: Literal["relu", "leaky_relu", "elu", "identity"] = "relu"
    activation_param: float = 0.01
    input_3x3: bool = False
    bn_mode: Literal["standard", "inplace", "sync"] = "standard"
    classes: int = 1000
    dilation: int = 1
    weight_gain_multiplier: float = 1.0
    weight_init: Literal["xavier_normal", "xavier_uniform", "kaiming_normal", "kaiming_uniform", "orthogonal"] = (
        "xavier_normal"
    )


@dataclass(frozen=True)
class ScheduleSection:
    """The learning rate's factor; `mode` says whether it changes with each epoch or each step."""

    type: Literal["constant", "step", "multistep", "exponential", "linear", "cosine", "poly"] = "constant"
    mode: Literal["epoch", "step"] = "epoch"
    epochs: int = 10
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerSection:
    """`batch_size` is the total over all processes; a `clip` of 0 is none; a `classifier_lr` of −1 is the rest's."""

    batch_size: int = 256
    type: Literal["SGD", "Adam"] = "SGD"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 1.0
    learning_rate: float = 0.1
    classifier_lr: float = -1.0
    nesterov: bool = False
    schedule: ScheduleSection = field(default_factory=ScheduleSection)


@dataclass(frozen=True)
class InputSection:
    """Sizes in pixels; −1 does not scale."""

    scale_train: int = -1
    crop_train: int = 224
    color_jitter_train: bool = False
    lighting_train: bool = False
    scale_val: int = 256
    crop_val: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TrainingSection:
    """What the earlier package did not have; the defaults leave it as it was."""

    label_smoothing: float = 0.0
    mixup: float = 0.0  # α of the Beta distribution; 0: none
    cutmix: float = 0.0
    augment: Literal["none", "trivial", "rand", "auto"] = "none"  # TrivialAugmentWide, RandAugment, AutoAugment
    erase: float = 0.0  # probability of random erasing
    repeats: int = 1  # how often an image comes in a row of an epoch, each time cropped anew (repeated augmentation)
    min_scale: float = 0.08  # smallest random crop, as a part of the area
    hflip: float = 0.5
    signed_scale: bool = False  # in-place norms with scales below 0, as standard BatchNorm has them
    decay_norms: bool = True  # whether weight decay acts on scales and biases
    ema_decay: float = 0.0  # of an average of the weights, taken at every step; 0: none
    warmup_epochs: int = 0
    warmup_factor: float = 0.01  # of the learning rate at the first step
    amp: Literal["off", "bf16", "fp16"] = "off"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1  # forward and backward passes that share a step; batch_size is their sum
    seed: int = 0


@dataclass(frozen=True)
class SegmentationSection:
    """Crops of scenes, of which `input.crop_train` is the side, and whole scenes for validation."""

    min_scale: float = 0.7  # of a scene's sides before the crop, drawn anew each time; after `input.scale_train`
    max_scale: float = 2.0
    uniform: float = 0.5  # part of the crops that are drawn by class, each class as often as any other
    ignore: int = 255  # number in the label files of what is nothing
    longest_val: int = 2048  # longer side that the network is shown in validation, in pixels; 0: as it is


@dataclass(frozen=True)
class Recipe:
    network: NetworkSection = field(default_factory=NetworkSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    input: InputSection = field(default_factory=InputSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    segmentation: SegmentationSection = field(default_factory=SegmentationSection)

    @property
    def task(self) -> str:
        """'classification' or 'segmentation', which the architecture decides."""
        return "segmentation" if self.model in SEGMENTERS else "classification"

    @property
    def model(self) -> str:
        """The registered name of the network: its architecture with the norms of `norm_layer`."""
        standard = f"{self.network.arch}_abn"
        return standard if self.norm_layer == "abn" and standard in MODELS else f"{self.network.arch}_iabn"

    @property
    def norm_layer(self) -> str:
        """The networks' name for the recipe's normalisation."""
        return NORM_LAYERS[self.network.bn_mode]

    @property
    def has_stem(self) -> bool:
        """Whether the network has the option `input_3x3`."""
        return self.network.arch.startswith(("resnext", "densenet"))

    def to_json(self) -> str:
        """Every setting, in the layout that `read_recipe` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


# What each schedule takes: the factor after `epoch` epochs, or that many steps.
_PARAMS: dict[str, dict[str, type]] = {
    "constant": {},
    "step": {"step_size": int, "gamma": float},  # gamma^⌊epoch/step_size⌋
    "multistep": {"milestones": list, "gamma": float},  # gamma to the number of milestones passed
    "exponential": {"gamma": float},  # gamma^epoch
    "linear": {"alpha": float, "beta": float},  # alpha·epoch + beta
    "cosine": {},  # (1 + cos(π·epoch/epochs))/2
    "poly": {"power": float},  # (1 − epoch/epochs)^power
}


def find_recipe(name: str, folder: Path) -> Path:
    """The JSON file of this name, or the recipe of this name in `folder`.

    Raises:
        RecipeError: there is none; the message lists the recipes.
    """
    path = Path(name)
    if not path.is_file() and path.suffix != ".json":
        path = folder / f"{name}.json"
    if not path.is_file():
        raise RecipeError(f"{name}: there is no such file or recipe; there are {', '.join(recipe_names(folder))}")
    return path


def recipe_names(folder: Path) -> list[str]:
    """The names of the recipes in a folder."""
    return sorted(path.stem for path in folder.glob("*.json"))


def read_recipe(path: Path | str, changes: typing.Iterable[str] = ()) -> Recipe:
    """The recipe in a JSON file, with `changes` such as 'optimizer.learning_rate=0.05' made to it.

    Raises:
        RecipeError: not JSON; unknown keys, wrong types, values that are not possible, alone or together.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise RecipeError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        content = json.loads(text, parse_constant=_no_number)
    except ValueError as e:
        raise RecipeError(f"{path}: is not JSON: {e}") from e
    for change in changes:
        _change(content, change)
    return recipe_from(content, str(path))


def recipe_from(content: Any, path: str) -> Recipe:
    """The recipe that parsed JSON holds; `path` is for messages.

    Raises:
        RecipeError: as `read_recipe`.
    """
    recipe: Recipe = _section(Recipe, content, path, "")
    _check(recipe, path)
    return recipe


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _change(content: Any, change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"{change!r} is not of the form section.key=value, such as optimizer.learning_rate=0.05")
    *sections, last = key.split(".")
    for name in sections:
        if not isinstance(content, dict):
            break
        content = content.setdefault(name, {})
    if not isinstance(content, dict):
        raise RecipeError(f"{change!r}: {'.'.join(sections)} has no keys")
    try:
        content[last] = json.loads(value, parse_constant=_no_number)
    except ValueError:
        content[last] = value  # a word without quotes


def _section(kind: Any, content: Any, path: str, name: str) -> Any:
    """A dataclass from a JSON object, every value checked against the type of its field."""
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: {name or 'the recipe'} must be an object, not {content!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(content) - set(hints))
    if unknown:
        inside = f" in {name}" if name else ""
        raise RecipeError(f"{path}: unknown key {unknown[0]!r}{inside}; there are {', '.join(hints)}")
    return kind(**{key: _value(hints[key], value, path, f"{name}.{key}".lstrip(".")) for key, value in content.items()})


def _value(hint: Any, value: Any, path: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, path, key)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise RecipeError(f"{path}: {key} is {value!r}; it can be {', '.join(typing.get_args(hint))}")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise RecipeError(f"{path}: {key} is {value!r}; it must be a list of numbers")
        return tuple(_value(float, each, path, key) for each in value)
    kind = typing.get_origin(hint) or hint
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float and number:
        return float(value)
    # JSON as written by others may hold 90.0 for 90, and 1 for true would be a mistake.
    if kind is int and number and value == int(value):
        return int(value)
    if kind in (int, float) or not isinstance(value, kind):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}
        raise RecipeError(f"{path}: {key} is {value!r}; it must be {names.get(kind, kind.__name__)}")
    return value


def _check(recipe: Recipe, path: str) -> None:
    """Refuse what is of the right type and cannot work."""
    network, optimizer, images = recipe.network, recipe.optimizer, recipe.input
    if recipe.model not in MODELS:
        known = sorted({name.rpartition("_")[0] for name in MODELS})
        raise RecipeError(
            f"{path}: network.arch is {network.arch!r}, and there is no such network" + suggest(network.arch, known)
        )
    if network.dilation != 1:
        raise RecipeError(f"{path}: network.dilation is {network.dilation}: networks are trained with 1 alone")
    if network.input_3x3 and not recipe.has_stem:
        raise RecipeError(f"{path}: network.input_3x3: {network.arch} has no other stem than its own")
    if network.activation == "relu" and network.bn_mode != "standard":
        raise RecipeError(
            f"{path}: network.activation relu cannot be inverted, which network.bn_mode {network.bn_mode} needs; "
            "use leaky_relu, elu or identity, or bn_mode standard"
        )
    if optimizer.nesterov and (optimizer.type != "SGD" or optimizer.momentum == 0):
        raise RecipeError(f"{path}: optimizer.nesterov needs type SGD and a momentum above 0")
    schedule = optimizer.schedule
    allowed = _PARAMS[schedule.type]
    for key, value in schedule.params.items():
        name = f"optimizer.schedule.params.{key}"
        if key not in allowed:
            there = ", ".join(allowed) or "none"
            raise RecipeError(f"{path}: unknown key {name} for a schedule of type {schedule.type}; there are: {there}")
        _value(allowed[key], value, path, name)
        if key == "milestones":
            for each in value:
                _value(int, each, path, f"each of {name}")
        if key == "power" and value <= 0:
            raise RecipeError(f"{path}: {name} is {value}; it must be above 0")
        if key == "step_size" and value < 1:
            raise RecipeError(f"{path}: {name} is {value}; it must be 1 or more")
    missing = [key for key in allowed if key not in schedule.params and key not in ("gamma", "power")]
    if missing:
        raise RecipeError(f"{path}: a schedule of type {schedule.type} needs optimizer.schedule.params.{missing[0]}")
    training, scenes = recipe.training, recipe.segmentation
    limits = {
        "optimizer.batch_size": (optimizer.batch_size, 2, 1 << 24),
        "optimizer.learning_rate": (optimizer.learning_rate, 1e-9, 1e3),
        "optimizer.weight_decay": (optimizer.weight_decay, 0, 1),
        "optimizer.momentum": (optimizer.momentum, 0, 1 - 1e-9),
        "optimizer.clip": (optimizer.clip, 0, 1e6),
        "optimizer.schedule.epochs": (schedule.epochs, 1, 100_000),
        "network.classes": (network.classes, 1, 1 << 24),
        "input.crop_train": (images.crop_train, 16, 8192),
        "input.crop_val": (images.crop_val, 16, 8192),
        "training.label_smoothing": (training.label_smoothing, 0, 1 - 1e-9),
        "training.mixup": (training.mixup, 0, 100),
        "training.cutmix": (training.cutmix, 0, 100),
        "training.erase": (training.erase, 0, 1),
        "training.repeats": (training.repeats, 1, 64),
        "training.min_scale": (training.min_scale, 0.01, 1),
        "training.hflip": (training.hflip, 0, 1),
        "training.ema_decay": (training.ema_decay, 0, 1 - 1e-12),
        "training.warmup_epochs": (training.warmup_epochs, 0, 100_000),
        "training.warmup_factor": (training.warmup_factor, 0, 1),
        "training.accumulate": (training.accumulate, 1, optimizer.batch_size),
        "training.seed": (training.seed, 0, (1 << 32) - 1),
        "segmentation.min_scale": (scenes.min_scale, 0.01, scenes.max_scale),
        "segmentation.max_scale": (scenes.max_scale, 0.01, 100),
        "segmentation.uniform": (scenes.uniform, 0, 1),
        "segmentation.ignore": (scenes.ignore, 0, 255),
        "segmentation.longest_val": (scenes.longest_val, 0, 1 << 16),
    }
    if recipe.task == "segmentation":
        _check_segmentation(recipe, path)
    elif scenes != SegmentationSection():
        raise RecipeError(f"{path}: the section segmentation: {network.arch} is a classifier")
    if training.warmup_epochs >= schedule.epochs:
        raise RecipeError(
            f"{path}: training.warmup_epochs is {training.warmup_epochs}, and there are no more epochs than "
            f"{schedule.epochs}: train longer, or warm up for less (--set training.warmup_epochs=0)"
        )
    if len(images.mean) != 3 or len(images.std) != 3 or min(images.std) <= 0:
        raise RecipeError(f"{path}: input.mean and input.std are three numbers each, those of std above 0")
    for key, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise RecipeError(f"{path}: {key} is {value}; it must be {low:g} to {high:g}")
    for key, size, crop in (
        ("train", images.scale_train, images.crop_train),
        ("val", images.scale_val, images.crop_val),
    ):
        if 0 < size < crop and recipe.task == "classification":
            raise RecipeError(f"{path}: input.scale_{key} is {size}, less than input.crop_{key}, which is {crop}")


# What varies whole images with one label each.
OF_CLASSIFIERS = ("mixup", "cutmix", "augment", "erase", "repeats", "min_scale")


def _check_segmentation(recipe: Recipe, path: str) -> None:
    for name in OF_CLASSIFIERS:
        value = getattr(recipe.training, name)
        if value != getattr(TrainingSection, name):
            instead = "; set segmentation.min_scale" if name == "min_scale" else ""
            raise RecipeError(f"{path}: training.{name} is {value}: that is for classifiers{instead}")
