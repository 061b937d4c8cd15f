"""Channels whose normalised input cannot be recovered from the output, and their gradients.

The output is stored with a relative error u, half the machine epsilon of its dtype. Undoing the affine map divides that
error by γ: what is known of x̂ is about u·|z|/|γ|, with z = γ·x̂ + β [+ residual]. Where β or the residual is large and γ
is near zero, as in a residual branch that starts at zero, nothing of x̂ is left. The layer keeps the input of such
channels, and takes x̂ from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .activations import gradient
from .ops import accumulate_dtype
from .reference import column, effective_scale, slabs

SMALLEST_SCALE = 1e-5  # by which the operators divide
LARGEST_ERROR = 0.1  # of x̂, whose standard deviation is 1
RENEWAL = 100  # updates of the weight between two looks at the values, which on a GPU wait for it


def can_look(x: Tensor) -> bool:
    """Whether values may be read on the host now: not while a tracer, a transform or a CUDA graph records."""
    if torch._C._get_tracing_state() or torch._C._functorch.maybe_current_level() is not None:
        return False
    if type(x) not in (Tensor, torch.nn.Parameter) or not x.is_floating_point():
        return False
    return not x.is_meta and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


@torch.no_grad()
def unrecoverable_channels(
    weight: Tensor, bias: Tensor, residual: Tensor | None, dtype: torch.dtype, eps: float, signed_scale: bool
) -> Tensor | None:
    """Indices of the channels of which the output, stored in `dtype`, tells x̂ with more than `LARGEST_ERROR`.

    Args:
        weight, bias: (C,). residual: (N, C, *) or None.

    Returns:
        (K,) int64, or None if there are none.
    """
    gamma = effective_scale(weight.float(), eps, signed_scale).abs()
    size = gamma.square() + bias.float().square()
    if residual is not None and residual.numel() > 0:
        size += residual.square().mean([0, *range(2, residual.dim())], dtype=torch.float32)
    error = size.sqrt() * (torch.finfo(dtype).eps / 2)
    found = ((error > LARGEST_ERROR * gamma) | (gamma < SMALLEST_SCALE)).nonzero().flatten()
    return found if found.numel() else None


class KeptInput:
    """The input of some channels, and what it says about the gradients there.

    Args:
        channels: (K,) int64. x: their input, (N, K, *). mean, var: (C,) of all channels.
    """

    def __init__(self, channels: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> None:
        self.channels = channels
        self.x = x
        self.mean = mean
        self.var = var
        self.eps = eps

    def correct_sums(self, y: Tensor, dy: Tensor, act: int, param: float, sum_dz_xhat: Tensor) -> None:
        """Overwrite Σ dz·x̂ of the kept channels within `sum_dz_xhat` (C,)."""
        for channels, xhat, dz in self._parts(y, dy, act, param):
            sum_dz_xhat[channels] = (dz * xhat).sum([0, *range(2, y.dim())])

    def correct_gradient(
        self, y: Tensor, dy: Tensor, act: int, param: float, means: tuple[Tensor, Tensor], scale: Any, dx: Tensor
    ) -> None:
        """Overwrite the kept channels of dx = scale·(dz - mean_dz - x̂·mean_dz_xhat)/σ; `scale` is γ (C,) or None."""
        for channels, xhat, dz in self._parts(y, dy, act, param):
            mean_dz, mean_dz_xhat, var = (column(v, channels, y) for v in (*means, self.var))
            factor = (var + self.eps).rsqrt_()
            if scale is not None:
                factor *= column(scale, channels, y)
            dx[:, channels] = ((dz - mean_dz - xhat * mean_dz_xhat) * factor).to(dx.dtype)

    def _parts(self, y: Tensor, dy: Tensor, act: int, param: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Channels, x̂ and dz in the accumulate dtype, a slab at a time."""
        dtype = accumulate_dtype(y.dtype)
        for c in slabs(self.x):
            channels = self.channels[c]
            xhat = self.x[:, c].to(dtype) - column(self.mean, channels, y)
            xhat *= (column(self.var, channels, y) + self.eps).rsqrt_()
            yield channels, xhat, gradient(y[:, channels].to(dtype), dy[:, channels].to(dtype), act, param)
