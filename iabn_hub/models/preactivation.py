"""The pre-activation residual block of the ResNeXts and wide ResNets.

Identity Mappings in Deep Residual Networks (https://arxiv.org/abs/1603.05027).
"""

from typing import Any, Dict, Optional, Tuple

from torch import Tensor, nn

from .network import NormFactory


class PreActivationBlock(nn.Module):
    """norm, convolution, norm, convolution [, norm, convolution], then the sum with the shortcut.

    Args:
        inputs: channels coming in.
        widths: outputs of two 3×3 convolutions, or of a 1×1, a 3×3 and a 1×1.
        stride: of the first convolution and of the projection.
        dilation: of the 3×3 convolutions.
        groups: of the middle one of three convolutions.
        dropout: probability of dropping a channel before the last convolution.
    """

    def __init__(
        self,
        inputs: int,
        widths: Tuple[int, ...],
        norm: NormFactory,
        where: Dict[str, Any],
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # The first norm writes a new tensor: its input lives on as the shortcut, as a feature map handed out,
        # or as what a checkpointed block starts from again. Neither is kept for the backward pass.
        self.bn1 = norm(inputs, inplace=False)
        if len(widths) == 2:
            self.conv1 = _conv(inputs, widths[0], 3, stride, dilation, 1, where)
            self.bn2 = norm(widths[0])
            self.conv2 = _conv(widths[0], widths[1], 3, 1, dilation, 1, where)
            self.bn3 = self.conv3 = None
        else:
            self.conv1 = _conv(inputs, widths[0], 1, stride, 1, 1, where)
            self.bn2 = norm(widths[0])
            self.conv2 = _conv(widths[0], widths[1], 3, 1, dilation, groups, where)
            self.bn3 = norm(widths[1])
            self.conv3 = _conv(widths[1], widths[2], 1, 1, 1, 1, where)
        self.dropout: nn.Module = nn.Dropout2d(dropout) if dropout else nn.Identity()
        projects = stride != 1 or inputs != widths[-1]
        self.downsample: Optional[nn.Module] = _conv(inputs, widths[-1], 1, stride, 1, 1, where) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(x)
        if self.downsample is not None:
            shortcut = self.downsample(x)
        x = self.bn2(self.conv1(x))
        if self.bn3 is not None and self.conv3 is not None:
            x = self.conv3(self.dropout(self.bn3(self.conv2(x))))
        else:
            x = self.conv2(self.dropout(x))
        return x + shortcut  # not in place: hooks on the last convolution see, and keep, its output


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int, dilation: int, groups: int, where: Dict[str, Any]
) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False, **where)
