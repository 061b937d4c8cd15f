"""DenseNets with in-place ABN (growth 32, transitions that halve the channels).

Densely Connected Convolutional Networks (https://arxiv.org/abs/1608.06993).
"""

from typing import Any, List, Optional, Tuple, Union

import torch
from timm.models import register_model
from torch import Tensor, nn

from ..layers.pooling import AvgPool2d
from .builder import build
from .network import NormFactory, named_sequence, norm_factory, stage_strides
from .stem import StemmedNetwork
from .timm_config import default_cfgs_of

BOTTLENECK = 4  # channels of a layer's 1×1 convolution, in units of the growth


class DenseLayer(nn.Module):
    """norm, 1×1 convolution, norm, 3×3 convolution. The first norm overwrites the concatenation it is given."""

    def __init__(self, inputs: int, growth: int, dilation: int, norm: NormFactory, where: Any) -> None:
        super().__init__()
        self.bn1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, growth * BOTTLENECK, 1, bias=False, **where)
        self.bn2 = norm(growth * BOTTLENECK)
        self.conv2 = nn.Conv2d(growth * BOTTLENECK, growth, 3, padding=dilation, dilation=dilation, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.bn1(x))
        return self.conv2(self.bn2(x))


class DenseBlock(nn.ModuleList):
    """Layers that each see the concatenation of the block's input and of all earlier outputs."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Transition(nn.Module):
    """norm and 1×1 convolution; pooling by 2, unless the stage behind it is dilated instead."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: NormFactory, where: Any) -> None:
        super().__init__()
        self.bn = norm(inputs, inplace=False)  # its input may be a feature map that was handed out
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False, **where)
        self.pool: nn.Module = AvgPool2d(2) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.bn(x)))


class DenseNet(StemmedNetwork):
    """A DenseNet.

    Args:
        layers: dense layers in each of the four stages.
        growth: channels that each dense layer adds; the stem has twice as many.
        input_3x3: three 3×3 convolutions as the stem instead of one 7×7; the published network has it.
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
        growth: int = 32,
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
        channels = 2 * growth
        self.add_stem(channels, input_3x3, norm, where)
        plan = stage_strides((1, 2, 2, 2), 4, output_stride)
        for number, (depth, (stride, dilation, reduction)) in enumerate(zip(layers, plan), start=1):
            parts: List[Tuple[str, nn.Module]] = []
            if number > 1:
                parts.append(("transition", Transition(channels, channels // 2, stride, norm, where)))
                channels //= 2
            block = DenseBlock([DenseLayer(channels + i * growth, growth, dilation, norm, where) for i in range(depth)])
            channels += depth * growth
            self.add_module(f"layer{number}", named_sequence([], **dict(parts), block=block))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{number}"})
        self.finish(channels, norm(channels, inplace=False), activation, activation_param, where)


def _densenet(variant: str, pretrained: bool, options: dict[str, Any], **architecture: Any) -> nn.Module:
    return build(DenseNet, variant, pretrained, dict(architecture, **options))


default_cfgs = default_cfgs_of("densenet121_iabn", "densenet169_iabn", "densenet201_iabn", "densenet264_iabn")


@register_model
def densenet121_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """DenseNet-121 with in-place ABN; options as in `DenseNet`."""
    return _densenet("densenet121_iabn", pretrained, options, layers=(6, 12, 24, 16))


@register_model
def densenet169_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """DenseNet-169 with in-place ABN; options as in `DenseNet`."""
    return _densenet("densenet169_iabn", pretrained, options, layers=(6, 12, 32, 32))


@register_model
def densenet201_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """DenseNet-201 with in-place ABN; options as in `DenseNet`."""
    return _densenet("densenet201_iabn", pretrained, options, layers=(6, 12, 48, 32))


@register_model
def densenet264_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """DenseNet-264 with in-place ABN; options as in `DenseNet`."""
    return _densenet("densenet264_iabn", pretrained, options, layers=(6, 12, 64, 48))
