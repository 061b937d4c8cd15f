"""Batch and instance normalisation that keep their input, and how their output is computed again from it."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.activations import ELU, HARDSWISH, IDENTITY, LEAKY_RELU, RELU6, SILU, invert
from ..layers.autograd import Running, kernels
from ..layers.group_norm import over_samples

# What F.* makes of one tensor, for second derivatives.
_FUNCTIONS: dict[int, Any] = {
    IDENTITY: lambda z, _: z, LEAKY_RELU: F.leaky_relu, ELU: F.elu, SILU: lambda z, _: F.silu(z),
    HARDSWISH: lambda z, _: F.hardswish(z), RELU6: lambda z, _: F.relu6(z),
}  # fmt: skip


NOT_TRACKED: Running = (None, None, None, 0.0)


@dataclasses.dataclass(eq=False)
class Normalisation:
    """act(w·(x - mean)/sqrt(var + eps) + b [+ residual]) of x (N, C, *), with everything given but x and the residual.

    Attributes:
        weight, bias: (C,) or None; copied, since a sharded parameter may be away when the result is computed again.
        mean, var: (C,), or (N·C,) with `per_sample`; None until `measure` finds them.
        centred: they are the statistics of x, and so depend on it in the backward pass.
        per_sample: instance normalisation: the rows of one sample are channels of their own.
        activation: number and parameter of the kernels.
        joined: there is a residual.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Any
    var: Any
    eps: float
    centred: bool
    per_sample: bool
    activation: tuple[int, float] = (IDENTITY, 0.0)
    joined: bool = False

    @property
    def is_linear(self) -> bool:
        return self.activation[0] == IDENTITY

    def followed_by(self, activation: tuple[int, float] = (IDENTITY, 0.0), joined: bool = False) -> Normalisation:
        """The same with an activation, or with a residual as a second argument, in one pass over memory."""
        return dataclasses.replace(self, activation=activation, joined=joined or self.joined)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        def run(tensors: Any, vectors: Any) -> tuple[list[Tensor], list[Tensor]]:
            (t, joined), (weight, bias, mean, var) = tensors, vectors
            return [kernels(x).normalize(t, mean, var, weight, bias, joined, self.eps, *self.activation, True)], []

        return self._over(run, [x, residual], [self.weight, self.bias, self.mean, self.var])[0][0]

    def measure(self, x: Tensor, running: Running = NOT_TRACKED) -> Tensor:
        """The result for the statistics of x, which are remembered, and overwrite those that are given in `running`."""

        def run(tensors: Any, vectors: Any) -> tuple[list[Tensor], list[Tensor]]:
            y, *found = kernels(x).batch_normalize(*tensors, *vectors, None, self.eps, IDENTITY, 0.0, True, *running)
            return [y], found

        (y,), (self.mean, self.var) = self._over(run, [x], [self.weight, self.bias])
        return y

    def gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dx (N, C, *) and the gradients of weight and bias, (C,), of any floating dtype."""

        def run(tensors: Any, vectors: Any) -> tuple[list[Tensor], list[Tensor]]:
            (t, dt), (weight, bias, mean, var) = tensors, vectors
            dx, *sums = kernels(x).gradient_from_input(
                t, dt, mean, var, weight, bias, self.eps, *self.activation, self.centred
            )
            return [dx], sums[::-1]

        (dx,), found = self._over(run, [x, dy], [self.weight, self.bias, self.mean, self.var])
        return dx, *self._of_channels(x, *found)

    def gradients_from_output(self, z: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the result z (N, C, *), whose activation has an inverse."""

        def run(tensors: Any, vectors: Any) -> tuple[list[Tensor], list[Tensor]]:
            (t, dt), (weight, bias, var) = tensors, vectors
            recover = (weight, bias, None, self.eps, *self.activation, True)
            if self.centred:
                dx, _, *found = kernels(z).batch_gradient(t, dt, var, False, *recover)
            else:
                found = list(kernels(z).gradient_sums(t, dt, *recover))[::-1]
                dx, _ = kernels(z).input_gradient(t, dt, var, None, None, False, *recover)
            return [dx], found

        (dx,), found = self._over(run, [z, dz], [self.weight, self.bias, self.var])
        return dx, *self._of_channels(z, *found)

    def input_of(self, z: Tensor) -> Tensor:
        """x (N, C, *), recovered from the result z."""
        dtype = self.mean.dtype
        shape = (-1, z.size(1), *(1,) * (z.dim() - 2))
        x = invert(z.to(dtype), *self.activation, torch.finfo(z.dtype).eps)
        if self.weight is not None and self.bias is not None:
            x = x.sub_(self.bias.to(dtype).view(shape)).div_(self.weight.to(dtype).view(shape))
        x = x.mul_((self.var + self.eps).sqrt().view(shape)).add_(self.mean.view(shape))
        return x.to(z.dtype)

    def _over(self, function: Any, tensors: list[Tensor | None], vectors: Any) -> tuple[list[Tensor], list[Tensor]]:
        if self.per_sample:
            return over_samples(function, tensors, vectors)
        results: tuple[list[Tensor], list[Tensor]] = function(tensors, vectors)
        return results

    def _of_channels(self, x: Tensor, d_weight: Tensor, d_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias from those by channel, or by channel of each sample."""
        if self.per_sample:
            d_weight, d_bias = (v.view(-1, x.size(1)).sum(0) for v in (d_weight, d_bias))
        return d_weight, d_bias

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


class _KeepsInput(torch.autograd.Function):
    """From x to a Normalisation of it, whose gradient is computed from x."""

    @staticmethod
    def _save(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Normalisation) -> None:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias  # not saved: the gradient needs the copies alone
        ctx.versions = [None if v is None else v._version for v in (weight, bias)]
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
            if ctx.versions != [None if v is None else v._version for v in (weight, bias)]:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    "the weight or bias of a norm, before a backward pass with create_graph=True"
                )
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
    """The norm alone. In training, its statistics become those of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Normalisation,
        running: Running,
    ) -> Tensor:
        y = norm.measure(x, running) if norm.centred else norm(x)
        _KeepsInput._save(ctx, x, weight, bias, norm)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_KeepsInput._gradients(ctx, dy), None, None


class Activate(_KeepsInput):
    """The activation behind a norm: from its output y to act(y), with the gradients of both in one pass from x.

    The gradient goes to the norm's input, past the norm's own node. Only where somebody still holds y, and may ask for
    its gradient, does it go to y. With `inverted` it is computed from z = act(y), which `Inverse` puts in place of x.
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
        inverted: bool,
    ) -> Tensor:
        z = function(y)
        overwritten = z is y
        if overwritten:
            ctx.mark_dirty(y)
        _KeepsInput._save(ctx, x, weight, bias, norm)
        ctx.inverted = inverted
        ctx.y = None if overwritten else weakref.ref(y)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        y = None if ctx.y is None else ctx.y()
        if dz is not None and ctx.needs_input_grad[3] and y is not None:
            return None, None, None, _gradient_of(ctx.norm, y, dz), *(None,) * 3
        return *_KeepsInput._gradients(ctx, dz), *(None,) * 4


def _gradient_of(norm: Normalisation, y: Tensor, dz: Tensor) -> Tensor:
    """dz·act'(y) of standard operators."""
    number, param = norm.activation
    again = torch.is_grad_enabled()  # create_graph=True
    # Not y itself, whose hooks would run; its alias has the same graph.
    leaf = y.view_as(y) if again else y.detach().requires_grad_()
    with torch.enable_grad():
        z = _FUNCTIONS[number](leaf, param)
    (dy,) = torch.autograd.grad(z, leaf, dz, create_graph=again)
    return dy


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
    running = (running_mean, running_var, None, momentum)
    centred = training or running_mean is None or running_var is None
    mean, var = (None, None) if centred else map(_copied, running[:2])
    norm = Normalisation(_copied(weight), _copied(bias), mean, var, eps, centred, per_sample=False)
    y: Tensor = Normalise.apply(x, weight, bias, norm, running)
    if centred:
        torch.autograd.graph.increment_version([v for v in running[:2] if v is not None])
    return y, norm


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Normalisation]:
    """`torch.nn.functional.instance_norm` without running statistics, and how to compute its result again from x."""
    norm = Normalisation(_copied(weight), _copied(bias), None, None, eps, centred=True, per_sample=True)
    y: Tensor = Normalise.apply(x, weight, bias, norm, NOT_TRACKED)
    return y, norm


def _copied(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.detach().clone()


def unsupported(x: Tensor, options: dict[str, Any], values_per_channel: int) -> str:
    """Why the norm is left to torch, which may raise an error; empty if it is not."""
    weight, bias = options.get("weight"), options.get("bias")
    running = [options.get("running_mean"), options.get("running_var")]
    given = [v for v in (weight, bias, *running) if v is not None]
    if not x.requires_grad and (weight is None or not weight.requires_grad):
        return "no gradient flows: its input and its weight do not require one"
    if values_per_channel < 2:
        return "one value per channel"
    if type(x) is not Tensor or x.is_meta or not x.is_floating_point() or x.layout != torch.strided:
        return f"its input is a {type(x).__name__} of {x.dtype} on {x.device}"
    if (weight is None) != (bias is None) or (running[0] is None) != (running[1] is None):
        return "it has only one of weight and bias, or of mean and variance"
    if any(v.shape != x.shape[1:2] or v.device != x.device for v in given):
        return "its parameters do not fit its input"
    if not options.get("training", True) and running[0] is None:
        return "it is in eval mode without running statistics"
    if not options.get("eps", 1e-5) > 0:
        return "its eps is 0"
    if any(v.dtype != x.dtype and (x.dtype in _WIDE or v.dtype != torch.float32) for v in given):
        return f"its input is {x.dtype}, its parameters {given[0].dtype}"
    return ""


_WIDE = (torch.float32, torch.float64)  # of which torch takes parameters of the same dtype alone


def dense(x: Tensor) -> Tensor:
    """x in the layout that torch gives the result of a norm: contiguous, or with the channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return x
    return x.contiguous()
