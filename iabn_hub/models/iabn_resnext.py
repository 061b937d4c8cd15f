"""Pre-activation ResNeXts with 64 groups, as published with in-place ABN, and their standard-BatchNorm twin.

Aggregated Residual Transformations for Deep Neural Networks (https://arxiv.org/abs/1611.05431).
"""

from typing import Any, List, Optional, Tuple, Union

import torch
from timm.models import register_model
from torch import nn

from .builder import build
from .network import NormFactory, norm_factory, stage_strides
from .preactivation import PreActivationBlock
from .stem import StemmedNetwork
from .timm_config import default_cfgs_of


class ResNeXt(StemmedNetwork):
    """A pre-activation ResNeXt.

    Args:
        layers: blocks in each of the four stages.
        input_3x3: three 3×3 convolutions as the stem instead of one 7×7; the published networks have it.
        groups: of the 3×3 convolutions of the blocks.
        num_classes, in_chans, output_stride, global_pool, drop_rate, norm_layer, activation, activation_param,
        signed_scale, device, dtype: as in `iabn_resnet.ResNet`.
    """

    def __init__(
        self,
        layers: Tuple[int, int, int, int],
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        input_3x3: bool = True,
        groups: int = 64,
        norm_layer: Union[str, NormFactory] = "iabn",
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        signed_scale: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        where = {"device": device, "dtype": dtype}
        norm = norm_factory(norm_layer, activation, activation_param, signed_scale, device, dtype)
        channels = 64
        self.add_stem(channels, input_3x3, norm, where)
        widths = (128, 128, 256)
        plan = stage_strides((1, 2, 2, 2), 4, output_stride)
        for number, (depth, (stride, dilation, reduction)) in enumerate(zip(layers, plan), start=1):
            blocks: List[nn.Module] = []
            for _ in range(depth):
                blocks.append(PreActivationBlock(channels, widths, norm, where, stride, dilation, groups))
                channels, stride = widths[-1], 1
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{number}"})
            widths = (widths[0] * 2, widths[1] * 2, widths[2] * 2)
        self.finish(channels, norm(channels, inplace=False), activation, activation_param, where)


def _resnext(variant: str, pretrained: bool, options: dict[str, Any], **architecture: Any) -> nn.Module:
    return build(ResNeXt, variant, pretrained, dict(architecture, **options))


default_cfgs = default_cfgs_of("resnext50_iabn", "resnext101_iabn", "resnext152_iabn", "resnext101_abn")


@register_model
def resnext50_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNeXt-50 (64 groups, pre-activation) with in-place ABN; options as in `ResNeXt`."""
    return _resnext("resnext50_iabn", pretrained, options, layers=(3, 4, 6, 3))


@register_model
def resnext101_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNeXt-101 (64 groups, pre-activation) with in-place ABN; options as in `ResNeXt`."""
    return _resnext("resnext101_iabn", pretrained, options, layers=(3, 4, 23, 3))


@register_model
def resnext152_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNeXt-152 (64 groups, pre-activation) with in-place ABN; options as in `ResNeXt`."""
    return _resnext("resnext152_iabn", pretrained, options, layers=(3, 8, 36, 3))


@register_model
def resnext101_abn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNeXt-101 (64 groups, pre-activation) with standard BatchNorm, the published baseline; see `ResNeXt`."""
    return _resnext("resnext101_abn", pretrained, options, layers=(3, 4, 23, 3), norm_layer="abn")
