"""The differentiable steps of in-place ABN, which keep their output for the backward pass.

The backward pass is "InPlace-ABN II" of Rota Bulò, Porzi, Kontschieder (CVPR 2018, section 3): it recovers x̂ from y.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import distributed, ops, reference
from .activations import IDENTITY, gradient
from .backends.loading import chosen_backend, use_native
from .degenerate import KeptInput

Options = tuple[float, int, float, bool]  # eps, activation, its parameter, signed_scale: the operators' last arguments


def kernels(x: Tensor) -> Any:
    """The operators for the device of x; while a compiler is tracing, perhaps the formulas behind them."""
    if torch.compiler.is_compiling():
        return ops if calls_operators(x) else reference
    if chosen_backend() == "reference":
        return reference
    # The name of a device is a new string each time, which takes as long as the rest of this function.
    device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    if use_native(device).backend == "inductor":
        from .backends import inductor  # noqa: PLC0415  (it loads torch's compiler)

        return inductor
    return ops


def calls_operators(x: Tensor) -> bool:
    """Whether compiled code calls the operators, instead of their formulas, which the compiler could fuse.

    On a CPU the native kernels are faster than what Inductor makes of the formulas. On other devices that was not
    measured: there they are called inside `use_backend("native")`.
    """
    chosen = chosen_backend()
    wanted = chosen == "native" or (chosen is None and x.is_cpu)
    return wanted and _loads_native(x.device.type)


@torch.compiler.assume_constant_result
def _loads_native(device_type: str) -> bool:
    """Load the kernels while a compiler is tracing; raises what `use_native` does."""
    return use_native(device_type).backend == "native"


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: Options,
    inplace: bool,
) -> Tensor:
    """y from given statistics: x itself, overwritten, if `inplace`."""
    if inplace:
        kernels(x).normalize_(x, mean, var, weight, bias, residual, *options)
        return x
    y: Tensor = kernels(x).normalize(x, mean, var, weight, bias, residual, *options)
    return y


Running = tuple[Tensor | None, Tensor | None, Tensor | None, float]  # mean, variance, number of batches; momentum


def batch_normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: Options,
    inplace: bool,
    running: Running,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and variance of the batch; y is x itself, overwritten, if `inplace`. Renews what `running` has."""
    if inplace:
        mean, var = kernels(x).batch_normalize_(x, weight, bias, residual, *options, *running)
        return x, mean, var
    result: tuple[Tensor, Tensor, Tensor] = kernels(x).batch_normalize(x, weight, bias, residual, *options, *running)
    return result


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a second derivative at once; autograd would leave out what goes through the statistics."""

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "in-place ABN has no second derivative, which create_graph=True (a gradient penalty) asks for: use "
                "ABN, which keeps its input and has one (in this package's networks norm_layer='abn'); in place of "
                "InPlaceInstanceNorm and InPlaceGroupNorm, the layers of torch.nn"
            )
        try:
            saved = ctx.saved_tensors  # once: a checkpoint hands them out a single time
        except RuntimeError as e:
            if not re.search(r"modified by an inplace operation.*output 0 of (Batch|Group)?Normalize", str(e)):
                raise
            raise RuntimeError(
                "the output of an InPlaceABN, which its backward pass needs, was overwritten: use inplace=False in "
                "what follows the layer, such as ReLU(inplace=True); its own activation replaces a ReLU behind it"
            ) from e
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *gradients)
        with torch.no_grad():  # a compiler traces the backward pass with the forward pass
            return backward(ctx, saved, *gradients)

    return call


@first_order_only
def _batch_gradients(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and residual."""
    y, weight, bias, residual, var = saved
    options = ctx.options
    needed = want_x, want_weight, want_bias, want_residual, *_ = ctx.needs_input_grad
    want_dz = want_residual and options[1] != IDENTITY
    dx = dz = d_weight = d_bias = None
    if want_x:
        dx, dz, d_weight, d_bias = kernels(y).batch_gradient(y, dy, var, want_dz, weight, bias, residual, *options)
    else:  # a frozen producer
        if want_weight or want_bias:
            sum_dz, sum_dz_xhat = kernels(y).gradient_sums(y, dy, weight, bias, residual, *options)
            d_weight, d_bias = reference.affine_gradients(sum_dz, sum_dz_xhat, weight, bias, options[3])
        if want_dz:
            dz = gradient(y, dy, *options[1:3])
    return (
        dx,
        d_weight if want_weight else None,
        d_bias if want_bias else None,
        _residual_gradient(needed, options, dy, dz),
    )


class BatchNormalize(torch.autograd.Function):
    """A training step of one process: from x to y, with statistics whose part in the gradient is in that of x.

    They come out in the list `found`, if there is one: a function that overwrites a view may return one tensor only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: Options,
        inplace: bool,
        running: Running,
        found: list[Tensor] | None,
    ) -> Tensor:
        y, mean, var = batch_normalize(x, weight, bias, residual, options, inplace, running)
        if found is not None:
            found.extend((mean, var))
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, weight, bias, residual, var)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_batch_gradients(ctx, dy), None, None, None, None


def _residual_gradient(needed: tuple[bool, ...], options: Options, dy: Tensor, dz: Tensor | None) -> Tensor | None:
    if not needed[3]:
        return None
    return dy if options[1] == IDENTITY else dz


class TracedBatchNormalize(torch.autograd.Function):
    """`BatchNormalize` for a compiler: nothing is overwritten, and mean and variance are results as well."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = ops.batch_normalize(x, weight, bias, residual, *options)
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(y, weight, bias, residual, var)
        ctx.options = options
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *_batch_gradients(ctx, dy), None


class Normalize(torch.autograd.Function):
    """From x and given statistics to y: those of eval mode (`count` None), or of `count` values per channel.

    `keep` (K,) names channels of which x is kept as well, because y would not tell it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: int | Tensor | None,
        options: Options,
        inplace: bool,
        peers: distributed.Peers,
        keep: Tensor | None,
    ) -> Tensor:
        kept = None
        if keep is not None:
            kept = x if keep.numel() == x.size(1) else x.index_select(1, keep)
        y = normalize(x, mean, var, weight, bias, residual, options, inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(
            y, weight, bias, residual, var, count if isinstance(count, Tensor) else None,
            keep, kept, None if keep is None else mean,
        )  # fmt: skip
        ctx.count, ctx.options, ctx.peers = (None if isinstance(count, Tensor) else count), options, peers
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, residual, var, count, keep, x, mean = saved
        eps, activation, param, signed_scale = ctx.options
        act = (activation, param)
        kept = None if keep is None else KeptInput(keep, x, mean, var, eps)
        count = ctx.count if count is None else count
        want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
        recover = (weight, bias, residual, *ctx.options)
        d_weight = d_bias = dx = dz = means = None
        if want_weight or want_bias or (want_x and count is not None):
            sums = kernels(y).gradient_sums(y, dy, *recover)
            if kept is not None:
                kept.correct_sums(y, dy, *act, sums[1])
            d_weight, d_bias = reference.affine_gradients(sums[0], sums[1], weight, bias, signed_scale)
            if want_x and count is not None:
                sums = ctx.peers.add(*sums) if ctx.peers.count > 1 else sums
                means = (sums[0] / count, sums[1] / count)
        if want_x or want_residual:
            want_dz = want_residual and act[0] != IDENTITY
            dx, dz = kernels(y).input_gradient(y, dy, var, *(means or (None, None)), want_dz, *recover)
            if kept is not None and means is not None and want_x:
                scale = None if weight is None else reference.effective_scale(weight, eps, signed_scale)
                kept.correct_gradient(y, dy, *act, means, scale, dx)
        return (
            dx,
            d_weight if want_weight else None,
            d_bias if want_bias else None,
            _residual_gradient(ctx.needs_input_grad, ctx.options, dy, dz),
            *(None,) * 7,
        )
