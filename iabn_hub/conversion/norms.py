"""Batch normalisation by the package's kernels, which keeps its input; its output can be computed again from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layers.activations import IDENTITY, LEAKY_RELU
from ..layers.autograd import kernels
from ..layers.functional import _track


class BatchNorm(torch.autograd.Function):
    """y = w·(x - mean)/sqrt(var + eps) + b; with `training`, mean and var are those of the batch x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        eps: float,
        statistics: list[Tensor],
    ) -> Tensor:
        if training:
            y, mean, var = kernels(x).batch_normalize(x, weight, bias, None, eps, IDENTITY, 0.0, True)
            statistics.extend((mean, var))
        else:
            mean, var = statistics
            y = kernels(x).normalize(x, mean, var, weight, bias, None, eps, IDENTITY, 0.0, True)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.training, ctx.eps = training, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: torch's operator has a second derivative
            mask = [ctx.needs_input_grad[0], weight is not None, weight is not None]
            mean, var = mean.to(x.dtype), var.to(x.dtype)
            statistics = (None, None, mean, (var + ctx.eps).rsqrt()) if ctx.training else (mean, var, None, None)
            grads = torch.ops.aten.native_batch_norm_backward(
                dy, x, weight, *statistics, ctx.training, ctx.eps, mask
            )
            return *grads, None, None, None
        dx, d_weight, d_bias = _gradients(x, dy, weight, mean, var, ctx.eps, ctx.training, ctx.needs_input_grad[0])
        if weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return dx, d_weight if weight is not None else None, _as(d_bias, ctx.bias_dtype), None, None, None


def _as(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else gradient.to(dtype)


def _gradients(
    x: Tensor, dy: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, training: bool, want_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx, Σ dy·x̂ and Σ dy.

    The operators take x for the output of a layer without activation whose scale is ±σ and whose shift is the mean, so
    that x̂ comes from it. Their variance is chosen so that scale/sqrt(variance) is γ/σ.
    """
    spread = (var.double() + eps).sqrt()
    gamma = torch.ones_like(spread) if weight is None else weight.double()
    sign = torch.where(gamma < 0, -1.0, 1.0).to(spread.dtype)
    recover = (spread * sign, mean.double(), None, 0.0, IDENTITY, 0.0, True)
    variance = (spread.square() / gamma).square()
    if want_x and training:
        dx, _, sum_dy, sum_dy_xhat = kernels(x).batch_gradient(x, dy, variance, False, *recover)
    else:
        sum_dy, sum_dy_xhat = kernels(x).gradient_sums(x, dy, *recover)
        dx = kernels(x).input_gradient(x, dy, variance, None, None, False, *recover)[0] if want_x else None
    return dx, sum_dy_xhat * sign.to(sum_dy.dtype), sum_dy


class Normalisation:
    """How the output of a batch norm is computed again, alone or with what follows in one pass over memory."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> None:
        self.weight = None if weight is None else weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.mean, self.var, self.eps = mean, var, eps

    def __call__(self, x: Tensor) -> Tensor:
        return self.normalize(x, None, IDENTITY)

    def then_relu(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(norm(x) [+ residual])."""
        return self.normalize(x, residual, LEAKY_RELU)  # with a slope of 0

    def then_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """norm(x) + residual."""
        return self.normalize(x, residual, IDENTITY)

    def normalize(self, x: Tensor, residual: Tensor | None, activation: int) -> Tensor:
        y: Tensor = kernels(x).normalize(
            x, self.mean, self.var, self.weight, self.bias, residual, self.eps, activation, 0.0, True
        )
        return y


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Normalisation]:
    """`torch.nn.functional.batch_norm`, and how to compute its result again from x."""
    statistics: list[Tensor] = []
    if not training and running_mean is not None and running_var is not None:
        statistics = [running_mean.clone(), running_var.clone()]
    y: Tensor = BatchNorm.apply(x, weight, bias, training, eps, statistics)
    mean, var = statistics
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            _track(running_mean, running_var, mean, var, x.numel() // x.size(1), momentum)
    return y, Normalisation(weight, bias, mean, var, eps)
