"""Batch and instance normalisation that keep their input, and how their output is computed again from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.activations import ELU, HARDSWISH, IDENTITY, LEAKY_RELU, RELU6, SILU, invert
from ..layers.autograd import kernels
from ..layers.functional import track_statistics

# What F.* makes of one tensor, for second derivatives.
_FUNCTIONS: dict[int, Any] = {
    IDENTITY: lambda z, _: z, LEAKY_RELU: F.leaky_relu, ELU: F.elu, SILU: lambda z, _: F.silu(z),
    HARDSWISH: lambda z, _: F.hardswish(z), RELU6: lambda z, _: F.relu6(z),
}  # fmt: skip


class Normalisation:
    """act(w·(x - mean)/sqrt(var + eps) + b [+ residual]) of x (N, C, *), with everything given but x and the residual.

    Args:
        weight, bias: (C,) or None; copied, since a sharded parameter may be away when the result is computed again.
        mean, var: (C,), or (N·C,) with `per_sample`; None until `measure` finds them.
        centred: they are the statistics of x, and so depend on it in the backward pass.
        per_sample: instance normalisation: the rows of one sample are channels of their own.
    """

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Any,
        var: Any,
        eps: float,
        centred: bool,
        per_sample: bool,
        activation: tuple[int, float] = (IDENTITY, 0.0),
        joined: bool = False,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.mean, self.var, self.eps = mean, var, eps
        self.centred, self.per_sample = centred, per_sample
        self.activation = activation
        self.joined = joined

    @property
    def is_linear(self) -> bool:
        return self.activation[0] == IDENTITY

    def followed_by(self, activation: tuple[int, float] = (IDENTITY, 0.0), joined: bool = False) -> Normalisation:
        """The same with an activation, or with a residual as a second argument, in one pass over memory."""
        return Normalisation(
            self.weight, self.bias, self.mean, self.var, self.eps, self.centred, self.per_sample, activation,
            joined or self.joined,
        )  # fmt: skip

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = self._rows(x)
        if residual is not None:
            residual = self._rows(residual)
        y: Tensor = kernels(x).normalize(
            rows, self.mean, self.var, self._each(self.weight, x), self._each(self.bias, x), residual, self.eps,
            *self.activation, True,
        )  # fmt: skip
        return _shaped(y, x)

    def measure(self, x: Tensor) -> Tensor:
        """The result for the statistics of x, which are remembered."""
        affine = (self._each(self.weight, x), self._each(self.bias, x))
        rows, self.mean, self.var = kernels(x).batch_normalize(
            self._rows(x), *affine, None, self.eps, IDENTITY, 0.0, True
        )
        return _shaped(rows, x)

    def gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dx (N, C, *) and the gradients of weight and bias, (C,) in the accumulate dtype."""
        dx, sum_dz, sum_dz_xhat = kernels(x).gradient_from_input(
            self._rows(x), self._rows(dy), self.mean, self.var, self._each(self.weight, x), self._each(self.bias, x),
            self.eps, *self.activation, self.centred,
        )  # fmt: skip
        return _shaped(dx, x), *self._of_channels(x, sum_dz_xhat, sum_dz)

    def gradients_from_output(self, z: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the result z (N, C, *), whose activation has an inverse."""
        rows, gradient = self._rows(z), self._rows(dz)
        recover = (self._each(self.weight, z), self._each(self.bias, z), None, self.eps, *self.activation, True)
        if self.centred:
            dx, _, sum_dz, sum_dz_xhat = kernels(z).batch_gradient(rows, gradient, self.var, False, *recover)
        else:
            sum_dz, sum_dz_xhat = kernels(z).gradient_sums(rows, gradient, *recover)
            dx, _ = kernels(z).input_gradient(rows, gradient, self.var, None, None, False, *recover)
        return _shaped(dx, z), *self._of_channels(z, sum_dz_xhat, sum_dz)

    def input_of(self, z: Tensor) -> Tensor:
        """x (N, C, *), recovered from the result z."""
        rows = self._rows(z)
        dtype = self.mean.dtype
        shape = (1, -1, *(1,) * (rows.dim() - 2))
        x = invert(rows.to(dtype), *self.activation, torch.finfo(z.dtype).eps)
        weight, bias = self._each(self.weight, z), self._each(self.bias, z)
        if weight is not None and bias is not None:
            x = x.sub_(bias.to(dtype).view(shape)).div_(weight.to(dtype).view(shape))
        x = x.mul_((self.var + self.eps).sqrt().view(shape)).add_(self.mean.view(shape))
        return _shaped(x.to(z.dtype), z)

    def _of_channels(self, x: Tensor, sum_dz_xhat: Tensor, sum_dz: Tensor) -> tuple[Tensor, Tensor]:
        """Sums by channel of those by row."""
        if not self.per_sample:
            return sum_dz_xhat, sum_dz
        return sum_dz_xhat.view(x.size(0), x.size(1)).sum(0), sum_dz.view(x.size(0), x.size(1)).sum(0)

    def differentiable(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same of standard operators, which have second derivatives."""
        if self.centred and self.per_sample:
            y = F.instance_norm(x, weight=weight, bias=bias, eps=self.eps)
        elif self.centred:
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        else:
            y = F.batch_norm(x, self.mean, self.var, weight, bias, False, 0.0, self.eps)
        z: Tensor = _FUNCTIONS[self.activation[0]](y, self.activation[1])
        return z

    def _rows(self, x: Tensor) -> Tensor:
        if not self.per_sample or x.size(0) == 1:
            return x
        return x.contiguous().view(1, -1, *x.shape[2:])

    def _each(self, vector: Tensor | None, x: Tensor) -> Tensor | None:
        return vector.repeat(x.size(0)) if vector is not None and self.per_sample and x.size(0) > 1 else vector


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """The same memory in the shape of `like`, but not as a view: autograd refuses to overwrite those of a function."""
    if rows.shape == like.shape:
        return rows
    return rows.new_empty(0).set_(rows.untyped_storage(), 0, like.shape)  # type: ignore[call-overload]


class _KeepsInput(torch.autograd.Function):
    """From x to a Normalisation of it, whose gradient is computed from x."""

    @staticmethod
    def _save(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Normalisation) -> None:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias  # not saved: the gradient needs the copies alone
        ctx.norm = norm
        ctx.inverted = False
        ctx.set_materialize_grads(False)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if dy is None:
            return None, None, None
        (x,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        if torch.is_grad_enabled():  # create_graph=True
            given = [t for t, wanted in zip((x, weight, bias), ctx.needs_input_grad) if wanted]
            y = ctx.norm.differentiable(x, weight, bias)
            grads = iter(torch.autograd.grad(y, given, dy, create_graph=True))
            return tuple(next(grads) if wanted else None for wanted in ctx.needs_input_grad[:3])  # type: ignore[return-value]
        dx, d_weight, d_bias = (ctx.norm.gradients_from_output if ctx.inverted else ctx.norm.gradients)(x, dy)
        return (
            dx if ctx.needs_input_grad[0] else None,
            None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
        )


class Normalise(_KeepsInput):
    """The norm alone. The result of the batch's statistics is left in `found`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        given: tuple[Any, Any] | None,
        eps: float,
        per_sample: bool,
        found: list[Normalisation],
    ) -> Tensor:
        affine = [None if v is None else v.detach().clone() for v in (weight, bias)]
        mean, var = given or (None, None)
        norm = Normalisation(affine[0], affine[1], mean, var, eps, given is None, per_sample)
        y = norm(x) if given else norm.measure(x)
        found.append(norm)
        _KeepsInput._save(ctx, x, weight, bias, norm)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_KeepsInput._gradients(ctx, dy), *(None,) * 4


class Activate(_KeepsInput):
    """The activation behind a norm: from its output y to act(y), with the gradients of both in one pass from x.

    y is a second result of the norm's input, not a step on the way: the norm's own node has no part in this gradient.
    With `inverted` the gradients are computed from z = act(y), which `Inverse` puts in the place of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        norm: Normalisation,
        function: Any,
        overwrite: bool,
        inverted: bool,
    ) -> Tensor:
        z = function(y)
        if overwrite:
            ctx.mark_dirty(y)
        _KeepsInput._save(ctx, x, weight, bias, norm)
        ctx.inverted = inverted
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_KeepsInput._gradients(ctx, dz), *(None,) * 5


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Normalisation]:
    """`torch.nn.functional.batch_norm`, and how to compute its result again from x."""
    given = None
    if not training and running_mean is not None and running_var is not None:
        given = (running_mean.clone(), running_var.clone())
    found: list[Normalisation] = []
    y: Tensor = Normalise.apply(x, weight, bias, given, eps, False, found)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            track_statistics(running_mean, running_var, found[0].mean, found[0].var, x.numel() // x.size(1), momentum)
    return y, found[0]


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Normalisation]:
    """`torch.nn.functional.instance_norm` without running statistics, and how to compute its result again from x."""
    found: list[Normalisation] = []
    y: Tensor = Normalise.apply(x, weight, bias, None, eps, True, found)
    return y, found[0]
