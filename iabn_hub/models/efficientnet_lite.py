"""EfficientNet-Lite0, converted: timm's network, which keeps the inputs of its norms and computes the rest again.

EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (https://arxiv.org/abs/1905.11946), in the
variant without squeeze-and-excitation, with ReLU6. ReLU6 cannot be inverted, so the norms are those of timm and
`conversion.convert` drops what follows from their inputs.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.efficientnet import tf_efficientnet_lite0
from torch import nn

from ..conversion import convert
from .builder import build
from .timm_config import default_cfgs_of


class ConvertedLite0:
    """What `build` calls to make the network; `stages` is the number of its feature maps behind the stem."""

    stages = 4

    def __new__(cls, **options: Any) -> Any:
        model: nn.Module = tf_efficientnet_lite0(pretrained=False, **options)
        convert(model)
        return model


default_cfgs = default_cfgs_of("efficientnet_lite0_iabn", first_conv="conv_stem", classifier="classifier")


@register_model
def efficientnet_lite0_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """EfficientNet-Lite0, converted; options as in timm's `tf_efficientnet_lite0`."""
    return build(ConvertedLite0, "efficientnet_lite0_iabn", pretrained, options)
