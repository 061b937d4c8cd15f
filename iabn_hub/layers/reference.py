"""The operators in plain PyTorch: the default kernel on every device, and the oracle of the tests.

Channels do not depend on each other, so each operator takes them a slab at a time. What it
allocates besides its result stays below a few times SLAB_BYTES (or one channel, if that is larger).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .activations import activate_, gradient, gradient_at, invert
from .ops import accumulate_dtype, lib

SLAB_BYTES = 4 << 20  # of the accumulate dtype: small beside any activation worth saving, large beside call overhead


def slabs(x: Tensor) -> Iterable[slice]:
    if torch.compiler.is_compiling():
        return (slice(None),)  # traced as one formula over the whole tensor, which Inductor fuses
    channels = x.size(1)
    per_channel = max(1, x.numel() // max(1, channels)) * accumulate_dtype(x.dtype).itemsize
    step = max(1, SLAB_BYTES // per_channel)
    return (slice(start, start + step) for start in range(0, channels, step))


def column(v: Tensor, c: slice | Tensor, like: Tensor) -> Tensor:
    """Channels `c` of a per-channel vector, ready to broadcast over (N, C, *)."""
    return v[c].to(accumulate_dtype(like.dtype)).view(1, -1, *[1] * (like.dim() - 2))


def effective_scale(weight: Tensor, eps: float, signed_scale: bool) -> Tensor:
    """γ, shape and dtype of `weight`; TorchScript compiles it."""
    return weight if signed_scale else weight.abs() + eps


def _divisor(gamma: Tensor) -> Tensor:
    """γ for the recovery of x̂, not closer to 0 than 1e-5 (a literal: the compiler takes globals as inputs)."""
    return torch.where(gamma < 0, gamma.clamp(max=-1e-5), gamma.clamp(min=1e-5))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    mean, var = (torch.zeros(x.size(1), dtype=dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return mean, var
    dims = [0, *range(2, x.dim())]
    for c in slabs(x):
        slab = x[:, c].to(dtype)
        rough = slab.mean(dims)
        centred = slab - column(rough, slice(None), x)
        # The rounding of the first mean is a shift that the second pass measures and takes out again.
        shift = centred.mean(dims)
        mean[c] = rough + shift
        var[c] = (centred.square_().mean(dims) - shift.square()).clamp_(min=0)
    return mean, var


def _normalize_into(
    out: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    activation_param: float,
    signed_scale: bool,
) -> None:
    for c in slabs(x):
        scale = (column(var, c, x) + eps).rsqrt_()
        if weight is not None:
            scale = scale * effective_scale(column(weight, c, x), eps, signed_scale)
        z = (x[:, c] - column(mean, c, x)).mul_(scale)
        if bias is not None:
            z += column(bias, c, x)
        if residual is not None:
            z += residual[:, c]
        out[:, c] = activate_(z, activation, activation_param)


def normalize(x: Tensor, *args: object) -> Tensor:
    y = torch.empty_like(x)
    _normalize_into(y, x, *args)  # type: ignore[arg-type]
    return y


def normalize_(x: Tensor, *args: object) -> None:
    _normalize_into(x, x, *args)  # type: ignore[arg-type]


def batch_normalize(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = statistics(x)
    affine, running = args[:7], args[7:]
    _track(x, mean, var, *running)  # type: ignore[arg-type]
    return normalize(x, mean, var, *affine), mean, var


def batch_normalize_(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    mean, var = statistics(x)
    affine, running = args[:7], args[7:]
    _track(x, mean, var, *running)  # type: ignore[arg-type]
    normalize_(x, mean, var, *affine)
    return mean, var


def _track(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches: Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    count = x.numel() // max(1, x.size(1))
    if running_mean is not None and running_var is not None and count > 0:
        update_statistics_(running_mean, running_var, mean, var, momentum, count / max(1, count - 1))
    if num_batches is not None:
        num_batches.add_(1)


def _recover(
    y: Tensor,
    dy: Tensor,
    c: slice,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    activation_param: float,
    signed_scale: bool,
) -> tuple[Tensor, Tensor]:
    """dz and x̂ of channels `c`, as new tensors of the accumulate dtype."""
    dtype = accumulate_dtype(y.dtype)
    slab = y[:, c].to(dtype)
    dz = gradient(slab, dy[:, c].to(dtype), activation, activation_param)
    xhat = invert(slab, activation, activation_param, torch.finfo(y.dtype).eps)
    if residual is not None:
        xhat -= residual[:, c]
    if bias is not None:
        xhat -= column(bias, c, y)
    if weight is not None:
        xhat /= _divisor(effective_scale(column(weight, c, y), eps, signed_scale))
    return dz, xhat


def gradient_sums(y: Tensor, dy: Tensor, *recover: object) -> tuple[Tensor, Tensor]:
    sum_dz, sum_dz_xhat = (y.new_empty(y.size(1), dtype=accumulate_dtype(y.dtype)) for _ in range(2))
    dims = [0, *range(2, y.dim())]
    for c in slabs(y):
        dz, xhat = _recover(y, dy, c, *recover)  # type: ignore[arg-type]
        sum_dz[c] = dz.sum(dims)
        sum_dz_xhat[c] = xhat.mul_(dz).sum(dims)
    return sum_dz, sum_dz_xhat


def input_gradient(
    y: Tensor,
    dy: Tensor,
    var: Tensor,
    mean_dz: Tensor | None,
    mean_dz_xhat: Tensor | None,
    want_dz: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    activation_param: float,
    signed_scale: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(y)
    dz_out = torch.empty_like(y) if want_dz else y.new_empty(0)
    for c in slabs(y):
        dz, xhat = _recover(y, dy, c, weight, bias, residual, eps, activation, activation_param, signed_scale)
        if want_dz:
            dz_out[:, c] = dz
        if mean_dz is not None and mean_dz_xhat is not None:
            dz -= column(mean_dz, c, y)
            dz -= xhat.mul_(column(mean_dz_xhat, c, y))
        dz *= (column(var, c, y) + eps).rsqrt_()
        if weight is not None:
            dz *= effective_scale(column(weight, c, y), eps, signed_scale)
        dx[:, c] = dz
    return dx, dz_out


def batch_gradient(
    y: Tensor, dy: Tensor, var: Tensor, want_dz: bool, weight: Tensor | None, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    recover: Any = (weight, bias, *rest)
    sum_dz, sum_dz_xhat = gradient_sums(y, dy, *recover)
    count = max(1, y.numel() // max(1, y.size(1)))
    dx, dz = input_gradient(y, dy, var, sum_dz / count, sum_dz_xhat / count, want_dz, *recover)
    return dx, dz, *affine_gradients(sum_dz, sum_dz_xhat, weight, bias, signed_scale=bool(rest[-1]))


def affine_gradients(
    sum_dz: Tensor, sum_dz_xhat: Tensor, weight: Tensor | None, bias: Tensor | None, signed_scale: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias, (C,), in their dtypes."""
    d_weight = sum_dz_xhat
    if weight is not None:
        d_weight = d_weight if signed_scale else torch.where(weight < 0, -d_weight, d_weight)
        d_weight = d_weight.to(weight.dtype)
    return d_weight, sum_dz if bias is None else sum_dz.to(bias.dtype)


def gradient_from_input(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    activation_param: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    dx = torch.empty_like(x)
    sum_dz, sum_dz_xhat = (x.new_empty(x.size(1), dtype=dtype) for _ in range(2))
    dims = [0, *range(2, x.dim())]
    count = max(1, x.numel() // max(1, x.size(1)))
    for c in slabs(x):
        scale = (column(var, c, x) + eps).rsqrt_()
        z = xhat = (x[:, c] - column(mean, c, x)).mul_(scale)
        if weight is not None:
            z = xhat * column(weight, c, x)
            scale = scale * column(weight, c, x)
        if bias is not None:
            z = z + column(bias, c, x)
        dz = gradient_at(z, dy[:, c].to(dtype), activation, activation_param)
        sum_dz[c] = dz.sum(dims)
        sum_dz_xhat[c] = (dz * xhat).sum(dims)
        if centred:
            dz -= column(sum_dz, c, x) / count
            dz -= xhat.mul_(column(sum_dz_xhat, c, x) / count)
        dx[:, c] = dz.mul_(scale)
    return dx, sum_dz, sum_dz_xhat


def update_statistics_(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, correction: float
) -> None:
    for running, batch, share in ((running_mean, mean, momentum), (running_var, var, momentum * correction)):
        running.mul_(1 - momentum).add_(batch, alpha=share)


for _kernel in (
    statistics, normalize, normalize_, batch_normalize, batch_normalize_,
    gradient_sums, input_gradient, batch_gradient, gradient_from_input,
    update_statistics_,
):  # fmt: skip
    lib.impl(_kernel.__name__, _kernel, "CompositeExplicitAutograd")
