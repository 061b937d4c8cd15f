"""In-place activated instance and group normalisation, which keep only their output for the backward pass.

Both are batch normalisation over other rows: of each sample, a channel (instance norm) or a group of channels (group
norm; Wu and He, ECCV 2018) has its own mean and variance. They run on the operators of in-place ABN: with the N·C
channels of all samples in one row where x is contiguous, else sample by sample, so that no layout is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .activations import IDENTITY, activation_number
from .autograd import Options, first_order_only, kernels
from .degenerate import RENEWAL, can_look, unrecoverable_channels
from .functional import needs_standard_operators
from .ops import accumulate_dtype
from .overwriting import may_overwrite
from .standard import activate


class InPlaceGroupNorm(nn.Module):
    """GroupNorm, an optional residual sum, and an activation in place: `y = act(GN(x) [+ residual])`.

    Weights of `nn.GroupNorm` fit. Channels whose scale is too near 0 to recover the input from the output let the layer
    run as standard operators, which keep their input; it looks again every hundred updates of the weight.

    Args:
        num_groups: groups that the C channels are divided into; each has its own statistics in each sample.
        num_channels: channels C of the (N, C, *) input.
        eps: added to the variance.
        affine: learn `weight` and `bias`, both (C,).
        activation: 'leaky_relu', 'elu' or 'identity'.
        activation_param: negative slope of leaky_relu, alpha of elu.
        inplace: overwrite the input in training where that does no harm; what is kept stays the same without it.

    Raises:
        ValueError: num_channels is no multiple of num_groups, or the activation is unknown or has no inverse; at call
            time, one value per group.

    Example:
        >>> import torch, iabn_hub
        >>> norm = iabn_hub.InPlaceGroupNorm(4, 8, activation="elu", activation_param=1.0)
        >>> norm(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        *,
        inplace: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_channels is {num_channels}: it must be a multiple of num_groups, {num_groups}")
        activation_number(activation, activation_param, invertible=False)
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self.activation, self.activation_param, self.inplace = activation, activation_param, inplace
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            vector = nn.Parameter(torch.full((num_channels,), value, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, vector)
        self._looked_at: tuple[int, torch.dtype | None] = (0, None)
        self._recoverable = True

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(GN(x) [+ residual]), (N, C, *) like x and residual; x is overwritten if `inplace`, in training."""
        if isinstance(x, fx.Proxy):  # a node of its own in a graph of torch.fx, like the layers of torch.nn
            tracer: Any = x.tracer
            arguments = (x,) if residual is None else (x, residual)
            node: Any = tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {})
            return node
        return inplace_group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, self.activation, self.activation_param,
            residual=residual, inplace=self.inplace and self.training, keep_input=not self._recovers(x, residual),
        )  # fmt: skip

    def _recovers(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether the output tells the input, as of the last look at the weight."""
        weight, bias = self.weight, self.bias
        if weight is None or bias is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return True
        version, dtype = self._looked_at
        if (dtype != x.dtype or not version <= weight._version < version + RENEWAL) and can_look(x):
            self._recoverable = unrecoverable_channels(weight, bias, residual, x.dtype, self.eps, True) is None
            self._looked_at = (weight._version, x.dtype)
        return self._recoverable

    def extra_repr(self) -> str:
        parameter = f"[{self.activation_param}]" if self.activation in ("leaky_relu", "elu") else ""
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"activation={self.activation}{parameter}"
        )


class InPlaceInstanceNorm(InPlaceGroupNorm):
    """InstanceNorm, an optional residual sum, and an activation in place, for (N, C, *) of one to three dimensions.

    Weights of `nn.InstanceNorm1d`, `nn.InstanceNorm2d` and `nn.InstanceNorm3d` without running statistics fit.

    Args:
        num_features: channels C. The others as in `InPlaceGroupNorm`; like torch's, it is not affine by default.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = False,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        *,
        inplace: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, num_features, eps, affine, activation, activation_param,
            inplace=inplace, device=device, dtype=dtype,
        )  # fmt: skip


def inplace_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    activation_param: float = 0.01,
    *,
    residual: Tensor | None = None,
    inplace: bool = True,
    keep_input: bool = False,
) -> Tensor:
    """Group normalisation, an optional residual sum, and an invertible activation; keeps only its output.

    Args:
        x: shape (N, C, *), float16, bfloat16, float32 or float64, any strides. Overwritten with the result unless
            ``inplace=False``, or unless that would do harm, as in `inplace_abn`.
        num_groups: C for instance normalisation.
        weight, bias: shape (C,), or None for 1 and 0.
        keep_input: compute it by standard operators, which keep x; for weights near 0.
        eps, activation, activation_param, residual: as in `inplace_abn`.

    Returns:
        y, with shape and dtype of x: x itself where that was overwritten.

    Raises:
        ValueError: wrong shapes, one value per group, or an activation without an inverse where a gradient is needed.
        TypeError: x is not of a floating dtype.
    """
    given = [t for t in (x, weight, bias, residual) if t is not None]
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    number = activation_number(activation, activation_param, invertible=with_gradient)
    if not x.is_floating_point():
        raise TypeError(f"the input must be of a floating dtype, got {x.dtype}")
    if keep_input or torch.compiler.is_compiling() or needs_standard_operators(*given) or x.numel() == 0:
        return _standard(x, num_groups, weight, bias, eps, activation, activation_param, residual)
    _check(x, num_groups, weight, bias, residual)
    residual = None if residual is None else residual.to(x.dtype)
    options = (eps, number, activation_param, True)
    inplace = inplace and may_overwrite(x, residual)
    y: Tensor = GroupNormalize.apply(x, weight, bias, residual, num_groups, options, inplace)
    return y


def _check(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() < 2 or x.size(1) % num_groups:
        raise ValueError(f"the input must be (N, C, *), C a multiple of {num_groups}, got shape {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (x.size(1),):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, but the input has {x.size(1)} channels")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {residual.shape}, the input {x.shape}: they must be equal")
    if x.numel() == x.size(0) * num_groups:
        raise ValueError(f"one value per group, got an input of shape {tuple(x.shape)}: it has no variance")


def _standard(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    activation_param: float,
    residual: Tensor | None,
) -> Tensor:
    """The layer from standard operators alone."""
    if weight is not None and weight.dtype != x.dtype:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return activate(y if residual is None else y + residual.to(y.dtype), activation, activation_param)


# ---- differentiation -------------------------------------------------------------------------------------------------

Function = Callable[[Any, Any], tuple[list[Tensor], list[Tensor]]]


class GroupNormalize(torch.autograd.Function):
    """From x to y, whose backward pass recovers x̂ from y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        groups: int,
        options: Options,
        inplace: bool,
    ) -> Tensor:
        ops = kernels(x)
        together = groups == x.size(1)  # instance norm: the operators measure and normalise in one

        def run(big: Any, vectors: Any) -> tuple[list[Tensor], list[Tensor]]:
            (t, joined), (w, b) = big, vectors
            if together:
                if inplace:
                    mean, var = ops.batch_normalize_(t, w, b, joined, *options)
                    return [], [var]
                y, mean, var = ops.batch_normalize(t, w, b, joined, *options)
                return [y], [var]
            mean, var = ops.statistics(t)
            mean, var = _of_groups(mean, var, groups * t.size(1) // x.size(1))
            if inplace:
                ops.normalize_(t, mean, var, w, b, joined, *options)
                return [], [var]
            return [ops.normalize(t, mean, var, w, b, joined, *options)], [var]

        results, (var,) = over_samples(run, [x, residual], [weight, bias])
        if inplace:
            ctx.mark_dirty(x)
        y = x if inplace else results[0]
        ctx.save_for_backward(y, weight, bias, residual, var)
        ctx.groups, ctx.options = groups, options
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, residual, var = saved
        ops = kernels(y)
        want_dz = ctx.needs_input_grad[3] and ctx.options[1] != IDENTITY
        per_group = y.numel() // (y.size(0) * ctx.groups)

        def run(big: Any, vectors: Any) -> tuple[list[Tensor], list[Tensor]]:
            (t, dt, joined), (w, b, variance) = big, vectors
            recover = (w, b, joined, *ctx.options)
            if ctx.groups == y.size(1):
                dx, dz, *gradients = ops.batch_gradient(t, dt, variance, want_dz, *recover)
            else:
                sums = ops.gradient_sums(t, dt, *recover)
                means = _means_of_groups(sums, w, ctx.groups * sums[0].numel() // y.size(1), per_group)
                dx, dz = ops.input_gradient(t, dt, variance, *means, want_dz, *recover)
                gradients = list(sums)[::-1]  # the scale is signed
            return [dx, dz] if want_dz else [dx], gradients

        (dx, *dz), gradients = over_samples(run, [y, dy, residual], [weight, bias, var])
        d_weight, d_bias = (v.view(y.size(0), -1).sum(0) for v in gradients)
        d_residual = dy if ctx.needs_input_grad[3] and not want_dz else dz[0] if want_dz else None
        return (
            dx,
            d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            d_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None,
            d_residual,
            *(None,) * 3,
        )


def _of_groups(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel's group from those of the channels, all (N·C,)."""
    means = mean.view(groups, -1)
    mean_of_group = means.mean(1, keepdim=True)
    var_of_group = (var.view(groups, -1) + (means - mean_of_group).square()).mean(1, keepdim=True)
    return mean_of_group.expand_as(means).flatten(), var_of_group.expand_as(means).flatten()


def _means_of_groups(
    sums: tuple[Tensor, Tensor], weight: Tensor | None, groups: int, count: int
) -> tuple[Tensor, Tensor]:
    """The means of dz and dz·x̂ that the operators subtract, (N·C,).

    dx = (γ·dz - mean(γ·dz) - x̂·mean(γ·dz·x̂))/σ with means over the group. The operators compute
    γ/σ·(dz - a - x̂·b), so that a and b are the means over γ.
    """
    gamma = torch.ones_like(sums[0]) if weight is None else weight.to(sums[0].dtype)
    means = [(s * gamma).view(groups, -1).sum(1, keepdim=True) / count for s in sums]
    a, b = ((m / gamma.view(groups, -1)).flatten() for m in means)
    return a, b


def over_samples(
    function: Function, tensors: Sequence[Tensor | None], vectors: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """A function of (1, N·C, *) tensors and (N·C,) vectors, for tensors (N, C, *).

    Args:
        function: gets and returns a list of tensors and one of vectors.
        tensors: the first decides: if it is contiguous, all are viewed as one sample; else the function is called for
            each sample with slices, so that no layout is converted.
        vectors: (C,), repeated for each sample in the accumulate dtype, so that no gradient of one sample is rounded;
            or (N·C,).

    Returns:
        The tensors (N, C, *) and the vectors (N·C,).
    """
    x = tensors[0]
    assert x is not None
    count, channels = x.shape[:2]
    wide = accumulate_dtype(x.dtype)
    repeated = [
        v.to(torch.promote_types(v.dtype, wide)).repeat(count) if v is not None and v.numel() == channels else v
        for v in vectors
    ]
    if count == 1:
        return function(tensors, repeated)
    if x.is_contiguous():
        rows = [None if t is None else t.contiguous().view(1, count * channels, *x.shape[2:]) for t in tensors]
        results, found = function(rows, repeated)
        return [reshaped(t, x.shape) for t in results], found
    parts = [
        function(
            [None if t is None else t[i : i + 1] for t in tensors],
            [None if v is None else v[i * channels : (i + 1) * channels] for v in repeated],
        )
        for i in range(count)
    ]
    return [torch.cat(ts) for ts in zip(*(p[0] for p in parts))], [torch.cat(vs) for vs in zip(*(p[1] for p in parts))]


def reshaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """The same memory in another shape, but not as a view: autograd refuses to overwrite those of a function."""
    if rows.shape == shape:
        return rows
    return rows.new_empty(0).set_(rows.untyped_storage(), 0, shape)  # type: ignore[call-overload]
