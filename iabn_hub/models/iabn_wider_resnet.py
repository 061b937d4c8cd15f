"""Wide pre-activation ResNets with six stages, and their A2 variants for dense prediction.

Wider or Deeper: Revisiting the ResNet Model for Visual Recognition (https://arxiv.org/abs/1611.10080).
"""

from typing import Any, List, Optional, Tuple, Union

import torch
from timm.models import register_model
from torch import Tensor, nn

from ..layers.pooling import MaxPool2d
from .builder import build
from .network import Network, NormFactory, named_sequence, norm_factory, stage_strides
from .preactivation import PreActivationBlock
from .timm_config import default_cfgs_of

WIDTHS: Tuple[Tuple[int, ...], ...] = (
    (128, 128),
    (256, 256),
    (512, 512),
    (512, 1024),
    (512, 1024, 2048),
    (1024, 2048, 4096),
)


class WiderResNet(Network):
    """A wide ResNet; its stem keeps the full resolution, so feature maps have strides 1, 2, 4, 8, 16, 32, 32.

    Args:
        layers: blocks in each of the six stages.
        a2: the variant that pools before the first two stages only, strides its convolutions after them, and drops
            channels in the last two stages; otherwise max pooling does all down-sampling.
        block_dropout: probability of dropping a channel in the last two stages (A2 only).
        output_stride: 4, 8, 16 or 32; below 32 the stages behind it are dilated. Segmentation takes A2 with 8.
        num_classes, in_chans, global_pool, drop_rate, norm_layer, activation, activation_param, signed_scale,
        device, dtype: as in `iabn_resnet.ResNet`.
    """

    stages: int = 6

    def __init__(
        self,
        layers: Tuple[int, int, int, int, int, int],
        a2: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        block_dropout: Tuple[float, float] = (0.3, 0.5),
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
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False, **where)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "conv1"}]
        plan = stage_strides((2, 2, 2, 2, 2, 1), 1, output_stride)
        for number, (depth, widths, (stride, dilation, reduction)) in enumerate(zip(layers, WIDTHS, plan), start=1):
            pools = number <= (2 if a2 else 5)
            pool = MaxPool2d(3, stride=stride, padding=1)
            before = {"pool": pool} if pools and number > 1 else {}
            if number == 1:
                self.maxpool = pool
            dropout = block_dropout[number - 5] if a2 and number >= 5 else 0.0
            blocks: List[nn.Module] = []
            for index in range(depth):
                first = stride if index == 0 and not pools else 1
                blocks.append(PreActivationBlock(channels, widths, norm, where, first, dilation, dropout=dropout))
                channels = widths[-1]
            self.add_module(f"layer{number}", named_sequence(blocks, **before))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{number}"})
        self.finish(channels, norm(channels, inplace=False), activation, activation_param, where)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def forward_stages(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]
        return self.layer6(self.layer5(self.layer4(x)))  # type: ignore[operator]


LAYERS = {16: (1, 1, 1, 1, 1, 1), 20: (1, 1, 1, 3, 1, 1), 38: (3, 3, 6, 3, 1, 1)}


def _wider(variant: str, pretrained: bool, options: dict[str, Any], **architecture: Any) -> nn.Module:
    return build(WiderResNet, variant, pretrained, dict(architecture, **options))


default_cfgs = default_cfgs_of(*(f"wider_resnet{depth}{variant}_iabn" for depth in LAYERS for variant in ("", "_a2")))


@register_model
def wider_resnet16_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """Wide ResNet-16 with in-place ABN; options as in `WiderResNet`."""
    return _wider("wider_resnet16_iabn", pretrained, options, layers=LAYERS[16])


@register_model
def wider_resnet20_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """Wide ResNet-20 with in-place ABN; options as in `WiderResNet`."""
    return _wider("wider_resnet20_iabn", pretrained, options, layers=LAYERS[20])


@register_model
def wider_resnet38_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """Wide ResNet-38 with in-place ABN; options as in `WiderResNet`."""
    return _wider("wider_resnet38_iabn", pretrained, options, layers=LAYERS[38])


@register_model
def wider_resnet16_a2_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """Wide ResNet-16 A2 with in-place ABN; options as in `WiderResNet`."""
    return _wider("wider_resnet16_a2_iabn", pretrained, options, layers=LAYERS[16], a2=True)


@register_model
def wider_resnet20_a2_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """Wide ResNet-20 A2 with in-place ABN; options as in `WiderResNet`."""
    return _wider("wider_resnet20_a2_iabn", pretrained, options, layers=LAYERS[20], a2=True)


@register_model
def wider_resnet38_a2_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """Wide ResNet-38 A2 with in-place ABN, the backbone of the segmentation network; options as in `WiderResNet`."""
    return _wider("wider_resnet38_a2_iabn", pretrained, options, layers=LAYERS[38], a2=True)
