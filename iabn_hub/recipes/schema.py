"""Recipes: how a network is trained, as a JSON file that is validated before anything is loaded.

The sections `network`, `optimizer` (with `schedule`) and `input` have the layout of the configuration files of the
package inplace_abn, so that those are read unchanged. The sections `training` and `segmentation` are new and optional.
"""

from __future__ import annotations

import json
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from ..models.factory import CONVERTED_MODELS, MODELS, SEGMENTATION_MODELS
from ..schema import Integer, record_class, replaced, to_dict

NORM_LAYERS = {"standard": "abn", "inplace": "iabn", "sync": "iabn_sync"}

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[Integer, Field(ge=16, le=8192)]
Positive = Annotated[Integer, Field(ge=1, le=1 << 24)]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key, the value and what is possible."""


@record_class
class NetworkSection:
    """The architecture and its initialisation; xavier and orthogonal use the gain of the activation."""

    arch: str = "resnet101"
    activation: Literal["relu", "leaky_relu", "elu", "identity"] = "relu"
    activation_param: float = 0.01
    input_3x3: bool = False
    bn_mode: Literal["standard", "inplace", "sync"] = "standard"
    classes: Positive = 1000
    dilation: Integer = 1
    weight_gain_multiplier: float = 1.0
    weight_init: Literal["xavier_normal", "xavier_uniform", "kaiming_normal", "kaiming_uniform", "orthogonal"] = (
        "xavier_normal"
    )


@record_class
class ScheduleSection:
    """The learning rate schedule; `mode` says whether it changes with each epoch or each step."""

    type: Literal["constant", "step", "multistep", "exponential", "linear", "cosine", "poly"] = "constant"
    mode: Literal["epoch", "step"] = "epoch"
    epochs: Annotated[Integer, Field(ge=1, le=100_000)] = 10
    params: dict[str, Any] = field(default_factory=dict)


@record_class
class OptimizerSection:
    """`batch_size` is the total over all ranks; `clip` 0 does not clip; `classifier_lr` −1 is `learning_rate`."""

    batch_size: Annotated[Integer, Field(ge=2, le=1 << 24)] = 256
    type: Literal["SGD", "Adam"] = "SGD"
    momentum: BelowOne = 0.9
    weight_decay: Fraction = 1e-4
    clip: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    learning_rate: Annotated[float, Field(ge=1e-9, le=1e3)] = 0.1
    classifier_lr: float = -1.0
    nesterov: bool = False
    schedule: ScheduleSection = field(default_factory=ScheduleSection)


@record_class
class InputSection:
    """Sizes in pixels; a scale of −1 does not resize."""

    scale_train: Integer = -1
    crop_train: Pixels = 224
    color_jitter_train: bool = False
    lighting_train: bool = False
    scale_val: Integer = 256
    crop_val: Pixels = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        0.229,
        0.224,
        0.225,
    )


@record_class
class TrainingSection:
    """Options that the configuration files of inplace_abn do not have; the defaults change nothing."""

    label_smoothing: BelowOne = 0.0
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0  # α of the Beta distribution; 0: none
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    augment: Literal["none", "trivial", "rand", "auto"] = "none"  # TrivialAugmentWide, RandAugment, AutoAugment
    erase: Fraction = 0.0  # probability of random erasing
    repeats: Annotated[Integer, Field(ge=1, le=64)] = 1  # crops of an image within an epoch (repeated augmentation)
    min_scale: Annotated[float, Field(ge=0.01, le=1)] = 0.08  # smallest random crop, as a fraction of the area
    hflip: Fraction = 0.5
    signed_scale: bool = False  # in-place norms with negative scales, as standard BatchNorm has them
    decay_norms: bool = True  # whether weight decay applies to scales and biases
    ema_decay: BelowOne = 0.0  # of the exponential moving average of the weights, updated at every step; 0: none
    warmup_epochs: Annotated[Integer, Field(ge=0, le=100_000)] = 0
    warmup_factor: Fraction = 0.01  # of the learning rate, at the first step
    amp: Literal["off", "bf16", "fp16"] = "off"
    channels_last: bool = False
    compile: bool = False
    pretrained: bool = False  # whether a new run starts from the published weights of its network
    accumulation_steps: Positive = 1  # forward and backward passes per optimizer step; batch_size is their sum
    seed: Annotated[Integer, Field(ge=0, le=(1 << 32) - 1)] = 0


@record_class
class SegmentationSection:
    """Random crops for training, of side `input.crop_train`, and whole images for validation."""

    min_scale: Annotated[float, Field(ge=0.01, le=100)] = 0.7  # of the sides before the crop, after `input.scale_train`
    max_scale: Annotated[float, Field(ge=0.01, le=100)] = 2.0
    class_balanced: Fraction = 0.5  # fraction of the crops whose target class is sampled uniformly
    ignore_index: Annotated[Integer, Field(ge=0, le=255)] = 255  # value in the label files that is not scored
    long_side_val: Annotated[Integer, Field(ge=0, le=1 << 16)] = 2048  # in validation, in pixels; 0: as it is


@record_class
class Recipe:
    """All settings of a training run."""

    network: NetworkSection = field(default_factory=NetworkSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    input: InputSection = field(default_factory=InputSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    segmentation: SegmentationSection = field(default_factory=SegmentationSection)

    @property
    def task(self) -> str:
        """'classification' or 'segmentation', which follows from the architecture."""
        return "segmentation" if self.model in SEGMENTATION_MODELS else "classification"

    @property
    def model(self) -> str:
        """The registered name of the network: its architecture with the norms of `norm_layer`."""
        standard = f"{self.network.arch}_abn"
        return standard if self.norm_layer == "abn" and standard in MODELS else f"{self.network.arch}_iabn"

    @property
    def norm_layer(self) -> str:
        """The networks' option `norm_layer`."""
        return NORM_LAYERS[self.network.bn_mode]

    @property
    def norms(self) -> str:
        """The kind of norm layers, for people: `norm_layer`, or 'converted'."""
        return "converted" if self.model in CONVERTED_MODELS else self.norm_layer

    @property
    def has_stem(self) -> bool:
        """Whether the network has the option `input_3x3`."""
        return self.network.arch.startswith(("resnext", "densenet"))

    def model_options(self) -> dict[str, Any]:
        """The options that the network is created with."""
        network = self.network
        if self.model in CONVERTED_MODELS:
            return {"num_classes": network.classes}
        options: dict[str, Any] = {
            "num_classes": network.classes,
            "norm_layer": self.norm_layer,
            "activation": network.activation,
            "activation_param": network.activation_param,
        }
        if self.has_stem:
            options["input_3x3"] = network.input_3x3
        if self.training.signed_scale:
            options["signed_scale"] = True
        return options

    def micro_batch(self, ranks: int) -> int:
        """Images of one forward pass on each of so many ranks."""
        return self.optimizer.batch_size // self.training.accumulation_steps // ranks

    def with_classes(self, classes: int) -> Recipe:
        """The recipe for another number of classes."""
        return replaced(self, network=replaced(self.network, classes=classes))

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values."""
        return to_dict(self)

    def to_json(self) -> str:
        """Every setting, in the layout that `read_recipe` reads."""
        return json.dumps(self.to_dict(), indent=2) + "\n"
