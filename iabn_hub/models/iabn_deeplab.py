"""DeepLabV3 for dense prediction, on a backbone of any family; published on a wide ResNet for Mapillary Vistas.

Rethinking Atrous Convolution for Semantic Image Segmentation (https://arxiv.org/abs/1706.05587), with the pooling of
In-Place Activated BatchNorm (https://arxiv.org/abs/1712.02616).
"""

from typing import Any, Dict, Optional, Tuple, Union

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from .builder import build
from .iabn_resnet import TEST_RESNET, ResNet
from .iabn_wider_resnet import LAYERS, WiderResNet
from .network import NormFactory, norm_factory
from .timm_config import default_cfgs_of

HIDDEN = 256  # channels of each branch, and of the head's output
DILATIONS = (12, 24, 36)  # of the 3×3 branches, in pixels of the backbone's map
POOLING = (84, 84)  # pixels of the backbone's map that evaluation averages; 672 of the image at stride 8


class DeepLabV3Head(nn.Module):
    """Four branches and pooled context, joined: (N, inputs, H, W) to (N, HIDDEN, H, W).

    Args:
        inputs: channels of the backbone's map.
        norm: makes the norms, see `network.norm_factory`.
        pooling: in eval mode, the context of a pixel is the mean of a window of this size around it, clipped to the
            map, since images are larger there than the crops of training; None takes the mean of the map, as training
            does.
    """

    def __init__(
        self, inputs: int, norm: NormFactory, pooling: Optional[Tuple[int, int]] = POOLING, where: Any = None
    ) -> None:
        super().__init__()
        where = where or {}
        self.pooling = pooling
        self.branches = nn.ModuleList([nn.Conv2d(inputs, HIDDEN, 1, bias=False, **where)])
        for d in DILATIONS:
            self.branches.append(nn.Conv2d(inputs, HIDDEN, 3, padding=d, dilation=d, bias=False, **where))
        self.bn_branches = norm(4 * HIDDEN)
        self.reduce = nn.Conv2d(4 * HIDDEN, HIDDEN, 1, bias=False, **where)
        self.pool = nn.Conv2d(inputs, HIDDEN, 1, bias=False, **where)
        self.bn_pool = norm(HIDDEN)
        self.reduce_pool = nn.Conv2d(HIDDEN, HIDDEN, 1, bias=False, **where)
        self.bn = norm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.bn_branches(torch.cat([branch(x) for branch in self.branches], 1)))
        # The window is as linear as the convolution behind it: pooled afterwards, a sixteenth of the channels is read.
        return self.bn(y + self.reduce_pool(self.bn_pool(self._context(self.pool(x)))))

    def _context(self, x: Tensor) -> Tensor:
        """The mean of the map, (N, C, 1, 1), or in eval mode of a window around each pixel, like x."""
        if self.training or self.pooling is None:
            return x.mean((2, 3), keepdim=True)
        height, width = (min(size, side) for size, side in zip(self.pooling, x.shape[2:]))
        x = F.avg_pool2d(F.avg_pool2d(x, (height, 1), stride=1), (1, width), stride=1)
        left, top = (width - 1) // 2, (height - 1) // 2
        return F.pad(x, (left, width - 1 - left, top, height - 1 - top), mode="replicate")


class DeepLabV3(nn.Module):
    """A backbone, the head, and a 1×1 classifier: images to logits at the backbone's stride.

    Args:
        backbone: images (N, in_chans, H, W) to a map, or to a list of maps of which the last counts (timm's
            `features_only`).
        channels: of that map.
        num_classes: 0 leaves the classifier out.
        norm, pooling: as in `DeepLabV3Head`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        num_classes: int,
        norm: NormFactory,
        pooling: Optional[Tuple[int, int]] = POOLING,
        where: Any = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = DeepLabV3Head(channels, norm, pooling, where)
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="leaky_relu")
        self.num_features = self.head_hidden_size = HIDDEN
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to (N, HIDDEN, H / stride, W / stride)."""
        maps = self.backbone(x)
        return self.head(maps[-1] if isinstance(maps, (list, tuple)) else maps)

    def forward(self, x: Tensor) -> Tensor:
        """Images, normalised as `pretrained_cfg` says, to logits (N, num_classes, H / stride, W / stride)."""
        return self.fc(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new 1×1 classifier for `num_classes` (0: none). There is no pooling to change."""
        like = self.head.reduce.weight
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Conv2d(HIDDEN, num_classes, 1, device=like.device, dtype=like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping what is inside them."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]


class DeepLabV3Network(DeepLabV3):
    """DeepLabV3 on a backbone of one of our families.

    Args:
        family: class of the backbone, such as `WiderResNet`.
        architecture: what makes a backbone of that class the one that is meant, such as its `layers`.
        output_stride: of the logits.
        num_classes, in_chans, norm_layer, activation, activation_param, signed_scale, device, dtype: as in
            `iabn_resnet.ResNet`. pooling: as in `DeepLabV3Head`.
    """

    def __init__(
        self,
        family: Any,
        architecture: Dict[str, Any],
        num_classes: int = 65,
        in_chans: int = 3,
        output_stride: int = 8,
        pooling: Optional[Tuple[int, int]] = POOLING,
        norm_layer: Union[str, NormFactory] = "iabn",
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        signed_scale: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        where = {"device": device, "dtype": dtype}
        backbone = family(
            **architecture, num_classes=0, in_chans=in_chans, output_stride=output_stride, global_pool="",
            norm_layer=norm_layer, activation=activation, activation_param=activation_param,
            signed_scale=signed_scale, **where,
        )  # fmt: skip
        norm = norm_factory(norm_layer, activation, activation_param, signed_scale, device, dtype)
        super().__init__(backbone, backbone.num_features, num_classes, norm, pooling, where)
        self.in_chans = in_chans


default_cfgs = default_cfgs_of("wider_resnet38_deeplab3_iabn", "test_resnet_deeplab3_iabn", first_conv="backbone.conv1")


def _deeplab(variant: str, pretrained: bool, options: dict[str, Any], family: Any, **architecture: Any) -> nn.Module:
    return build(DeepLabV3Network, variant, pretrained, {"family": family, "architecture": architecture, **options})


@register_model
def wider_resnet38_deeplab3_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """DeepLabV3 on wide ResNet-38 A2 with in-place ABN, for 65 classes of streets; options: `DeepLabV3Network`."""
    return _deeplab("wider_resnet38_deeplab3_iabn", pretrained, options, WiderResNet, layers=LAYERS[38], a2=True)


@register_model
def test_resnet_deeplab3_iabn(pretrained: bool = False, **options: Any) -> nn.Module:
    """DeepLabV3 on the test ResNet, for tests and demonstrations; options as in `DeepLabV3Network`."""
    return _deeplab("test_resnet_deeplab3_iabn", pretrained, options, ResNet, **TEST_RESNET)
