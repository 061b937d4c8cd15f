"""ResNets whose residual join is part of the in-place layer: `y = act(BN(x) + shortcut)` keeps only y.

Deep Residual Learning for Image Recognition (https://arxiv.org/abs/1512.03385), stride on the 3×3 convolution.
Parameters have timm's and torchvision's names, so that their ResNet weights fit (with `signed_scale=True`).
"""

from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from timm.models import register_model
from torch import Tensor, nn

from .builder import build
from .network import Network, NormFactory, norm_factory, stage_strides
from .timm_config import default_cfgs_of


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the second norm takes the shortcut in before the activation."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int, dilation: int, norm: NormFactory, downsample: nn.Module, where: Any
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride, dilation, where)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, 1, dilation, where)
        self.bn2 = norm(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions; the third norm takes the shortcut in before the activation."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, dilation: int, norm: NormFactory, downsample: nn.Module, where: Any
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 1, 1, 1, where)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, stride, dilation, where)
        self.bn2 = norm(width)
        self.conv3 = _conv(width, width * self.expansion, 1, 1, 1, where)
        self.bn3 = norm(width * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return self.bn3(self.conv3(x), shortcut)


def _conv(inputs: int, outputs: int, kernel: int, stride: int, dilation: int, where: Any) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False, **where)


class ResNet(Network):
    """A ResNet with activated norms.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each of the four stages.
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the input images.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided.
        global_pool: timm's pooling names; '' for none.
        drop_rate: dropout before the classifier.
        norm_layer: 'iabn', 'iabn_sync', 'abn', or a class with the arguments of InPlaceABN.
        activation, activation_param: of every norm layer.
        signed_scale: needed by weights that were trained with a standard BatchNorm.
        widths: channels of the blocks in each stage, before expansion; the stem has the first of them.
        device, dtype: of all parameters.
    """

    def __init__(
        self,
        block: Any,
        layers: Tuple[int, int, int, int],
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: Union[str, NormFactory] = "iabn",
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        signed_scale: bool = False,
        widths: Tuple[int, int, int, int] = (64, 128, 256, 512),
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        where = {"device": device, "dtype": dtype}
        norm = norm_factory(norm_layer, activation, activation_param, signed_scale, device, dtype)
        channels = widths[0]
        self.conv1 = nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False, **where)
        self.bn1 = norm(channels)
        self.feature_info = [{"num_chs": channels, "reduction": 2, "module": "bn1"}]
        plan = stage_strides((1, 2, 2, 2), 4, output_stride)
        for number, (depth, width, (stride, dilation, reduction)) in enumerate(zip(layers, widths, plan), start=1):
            blocks: List[nn.Module] = []
            outputs = width * block.expansion
            for _ in range(depth):
                downsample: nn.Module = nn.Identity()
                if stride != 1 or channels != outputs:
                    downsample = nn.Sequential(
                        _conv(channels, outputs, 1, stride, 1, where), norm(outputs, activation="identity")
                    )
                blocks.append(block(channels, width, stride, dilation, norm, downsample, where))
                channels, stride = outputs, 1
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{number}"})
        self.finish(channels, nn.Identity(), activation, activation_param, where)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


def _resnet(variant: str, pretrained: bool, options: dict[str, Any], **architecture: Any) -> nn.Module:
    return build(ResNet, variant, pretrained, dict(architecture, **options))


TEST_RESNET: Dict[str, Any] = {"block": BasicBlock, "layers": (1, 1, 1, 1), "widths": (24, 48, 72, 96)}

default_cfgs = default_cfgs_of(
    "resnet18_iabn", "resnet34_iabn", "resnet50_iabn", "resnet101_iabn", "resnet152_iabn", "test_resnet_iabn"
)


@register_model
def resnet18_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 with in-place ABN; options as in `ResNet`."""
    return _resnet("resnet18_iabn", pretrained, options, block=BasicBlock, layers=(2, 2, 2, 2))


@register_model
def resnet34_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-34 with in-place ABN; options as in `ResNet`."""
    return _resnet("resnet34_iabn", pretrained, options, block=BasicBlock, layers=(3, 4, 6, 3))


@register_model
def resnet50_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-50 with in-place ABN; options as in `ResNet`."""
    return _resnet("resnet50_iabn", pretrained, options, block=Bottleneck, layers=(3, 4, 6, 3))


@register_model
def resnet101_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-101 with in-place ABN; options as in `ResNet`."""
    return _resnet("resnet101_iabn", pretrained, options, block=Bottleneck, layers=(3, 4, 23, 3))


@register_model
def resnet152_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-152 with in-place ABN; options as in `ResNet`."""
    return _resnet("resnet152_iabn", pretrained, options, block=Bottleneck, layers=(3, 8, 36, 3))


@register_model
def test_resnet_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """A ResNet of 0.4 million parameters for tests and demonstrations; options as in `ResNet`."""
    return _resnet("test_resnet_iabn", pretrained, options, **TEST_RESNET)
