"""The stem of the pre-activation families: one 7×7 convolution, or three 3×3 with norms between them."""

from typing import Any, Dict

from torch import Tensor, nn

from .network import Network, NormFactory


class StemmedNetwork(Network):
    """A network that starts with `conv1` [`bn1` `conv2` `bn2` `conv3`], stride 2, without a last activation.

    `add_stem` takes `input_3x3`, which the published checkpoints of these families use.
    """

    def add_stem(self, channels: int, input_3x3: bool, norm: NormFactory, where: Dict[str, Any]) -> None:
        self.input_3x3 = input_3x3
        if input_3x3:
            self.conv1 = nn.Conv2d(self.in_chans, channels, 3, stride=2, padding=1, bias=False, **where)
            self.bn1 = norm(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **where)
            self.bn2 = norm(channels)
            self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **where)
        else:
            self.conv1 = nn.Conv2d(self.in_chans, channels, 7, stride=2, padding=3, bias=False, **where)
            self.bn1 = self.conv2 = self.bn2 = self.conv3 = None  # type: ignore[assignment]
        self.feature_info = [{"num_chs": channels, "reduction": 2, "module": "conv3" if input_3x3 else "conv1"}]

    def forward_stem(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.bn1 is not None and self.conv2 is not None and self.bn2 is not None and self.conv3 is not None:
            x = self.bn2(self.conv2(self.bn1(x)))
            x = self.conv3(x)
        return x
