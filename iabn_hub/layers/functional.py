"""In-place activated batch normalisation as functions: `inplace_abn` and `inplace_abn_sync`.

Rota Bulò, Porzi, Kontschieder: In-Place Activated BatchNorm for Memory-Optimized Training of DNNs,
CVPR 2018; the backward pass is the paper's "InPlace-ABN II" (section 3), which recovers x̂ from the output.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import distributed, ops, reference
from .activations import IDENTITY, gradient, invertible_activation
from .backends.loading import chosen_backend, use_native

_logger = logging.getLogger(__name__)


def inplace_abn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    activation_param: float = 0.01,
    *,
    residual: Tensor | None = None,
    inplace: bool = True,
    signed_scale: bool = False,
) -> Tensor:
    """Batch normalisation, an optional residual join, and an invertible activation; keeps only its output.

    Computes ``y = act(γ·(x - μ)/sqrt(σ² + eps) + β [+ residual])`` per channel, where γ is ``|weight| + eps``
    and β is ``bias``. For the backward pass it keeps y (and the residual, by reference), never x.

    Args:
        x: shape (N, C) or (N, C, *), float16, bfloat16, float32 or float64, any strides. Overwritten with the
            result unless ``inplace=False``.
        weight: shape (C,), or None for γ = 1. May be of another floating dtype than x.
        bias: shape (C,), or None for β = 0.
        running_mean, running_var: shape (C,), used in eval mode; in training updated in place with
            ``running += momentum·(batch - running)``, the variance unbiased. None: not tracked.
        training: use the statistics of this batch instead of the running ones.
        momentum: weight of this batch in the running statistics, a number or a tensor of one element.
        eps: added to the variance and to the scale.
        activation: ``leaky_relu``, ``elu`` or ``identity``.
        activation_param: negative slope of leaky_relu, alpha of elu; positive.
        residual: same shape as x, any floating dtype; added before the activation. Not overwritten.
        inplace: False writes the result to a new tensor and leaves x alone; what is kept stays the same.
        signed_scale: γ is ``sign(weight)·(|weight| + eps)``, so that weights of a standard BatchNorm fit.

    Returns:
        y, with shape and dtype of x: x itself when ``inplace``.

    Raises:
        ValueError: wrong shapes, one value per channel in training, an activation without an inverse,
            or eval mode without running statistics.
        TypeError: x is not of a floating dtype.

    Example:
        >>> import torch, iabn_hub
        >>> x = torch.randn(2, 4, 8, 8)
        >>> y = iabn_hub.inplace_abn(x, torch.ones(4), torch.zeros(4), None, None, activation="identity")
        >>> y is x, y.mean((0, 2, 3)).abs().max().item() < 1e-5
        (True, True)
    """
    return _forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, activation_param,
        residual, inplace, signed_scale, distributed.ALONE,
    )  # fmt: skip


def inplace_abn_sync(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    activation_param: float = 0.01,
    group: Any = None,
    *,
    residual: Tensor | None = None,
    inplace: bool = True,
    signed_scale: bool = False,
) -> Tensor:
    """`inplace_abn` with batch statistics over all processes of a group.

    One collective in the forward pass, one in the backward pass if x needs a gradient, none in eval mode. Batches may
    differ in size between the processes, and be empty. Without a process group, or outside of the group, it is
    `inplace_abn`. The gradients of weight and bias are those of this process, as DistributedDataParallel expects.

    Args:
        group: a `torch.distributed` group, or None for the default one. The other arguments are those
            of `inplace_abn`.
    """
    return _forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, activation_param,
        residual, inplace, signed_scale, distributed.Peers.of(group) if training else distributed.ALONE,
    )  # fmt: skip


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    activation_param: float,
    residual: Tensor | None,
    inplace: bool,
    signed_scale: bool,
    peers: distributed.Peers,
) -> Tensor:
    act = invertible_activation(activation, activation_param)
    if inplace and _autograd_refuses(x):
        _hint_at_new_tensor()
        inplace = False
    _check(x, residual, inplace, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if residual is not None:
        residual = residual.to(x.dtype)

    options = (eps, act, activation_param, signed_scale)
    values = x.numel() // max(1, x.size(1))  # per channel
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "eval mode needs running_mean and running_var; pass training=True to use the batch instead"
            )
        # Copies of (C,): the running statistics may move on before the backward pass.
        mean, var = running_mean.clone(), running_var.clone()
        given: Tensor = _Normalize.apply(x, weight, bias, residual, mean, var, None, options, inplace, peers)
        return given
    if values == 1 and peers.count == 1:
        raise one_value_per_channel(x)
    y: Tensor
    count: int | Tensor = values
    if peers.count == 1 and not torch.compiler.is_compiling():
        # autograd lets a function that overwrites a view return one tensor only: the statistics come out in a list.
        found: list[Tensor] = []
        y = _BatchNormalize.apply(x, weight, bias, residual, options, inplace, found)
        mean, var = found
    else:
        with torch.no_grad():
            mean, var = kernels(x).statistics(x.detach())
            if peers.count > 1:
                mean, var, count = peers.merge_statistics(mean, var, values)
        y = _Normalize.apply(x, weight, bias, residual, mean, var, count, options, inplace, peers)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            _track(running_mean, running_var, mean, var, count, momentum)
    return y


def kernels(x: Tensor) -> Any:
    """The operators for the device of x; while a compiler is tracing, the formulas behind them, so that it can fuse."""
    if torch.compiler.is_compiling():
        return reference
    if chosen_backend() == "reference":
        return reference
    if use_native(x.device.type).backend == "inductor":
        from .backends import inductor  # noqa: PLC0415  (it loads torch's compiler)

        return inductor
    return ops


def _check(x: Tensor, residual: Tensor | None, inplace: bool, **vectors: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"the input must be of a floating dtype, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"the input must be (N, C) or (N, C, *), got shape {tuple(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (x.size(1),):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, but the input {tuple(x.shape)} has {x.size(1)} channels"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, the input {tuple(x.shape)}: they must be equal")
    if inplace and residual is not None and _starts_where(residual, x):
        raise ValueError("residual is the input, which the layer overwrites but still needs: use inplace=False")
    if inplace:
        _check_overwritable(x)


@functools.cache
def _hint_at_new_tensor() -> None:
    _logger.info(
        "an input of in-place ABN is a view that autograd does not let be overwritten (from chunk, split or unbind, or "
        "behind a full backward hook): the layer writes a new tensor, and saves no more for the backward pass"
    )


def _autograd_refuses(x: Tensor) -> bool:
    """Whether x is a view that autograd would refuse to see overwritten, after it has been."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x._is_view():
        return False
    autograd: Any = torch._C._autograd
    refuses: bool = autograd._get_creation_meta(x) != autograd.CreationMeta.DEFAULT
    return refuses


def _check_overwritable(x: Tensor) -> None:
    """Refuse what autograd would refuse as well, but only after the input is lost."""
    base = x if x._base is None else x._base
    if base.is_leaf and base.requires_grad and torch.is_grad_enabled():
        raise ValueError("the input is a leaf that requires a gradient and cannot be overwritten: use inplace=False")
    if torch.compiler.is_compiling():
        return
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("the input was made in inference mode and cannot be overwritten outside: use inplace=False")
    if torch._debug_has_internal_overlap(x) == 1:
        raise ValueError("elements of the input share memory, as after expand(): use inplace=False or clone it")


def _starts_where(a: Tensor, b: Tensor) -> bool:
    if a is b or torch.compiler.is_compiling():
        return a is b
    shared: bool = torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]
    return shared and int(a.storage_offset()) == int(b.storage_offset())


def one_value_per_channel(x: Tensor) -> ValueError:
    return ValueError(
        f"training needs more than one value per channel, got an input of shape {tuple(x.shape)}: "
        "use a larger batch, or eval() to normalise with the running statistics"
    )


def _track(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int | Tensor, momentum: float | Tensor
) -> None:
    if isinstance(count, int) and count == 0:
        return  # an empty batch says nothing, as in BatchNorm
    correction: Any
    if isinstance(count, Tensor):  # one value in all processes together has no variance
        momentum, correction = momentum * (count > 1).to(var.dtype), count / (count - 1).clamp(min=1)
    else:
        correction = count / (count - 1)
    for running, batch, share in ((running_mean, mean, momentum), (running_var, var, momentum * correction)):
        # mul and add, not lerp: a running inf or NaN must not survive momentum 1.
        running.mul_(1 - momentum)
        if isinstance(share, Tensor):
            running.add_((batch * share).to(running.dtype))
        else:
            running.add_(batch, alpha=share)


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a second derivative at once; autograd would leave out what goes through the statistics."""

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "in-place ABN has no second derivative, which create_graph=True (a gradient penalty) asks for: use "
                "ABN, which keeps its input and has one (in this package's networks norm_layer='abn')"
            )
        try:
            saved = ctx.saved_tensors  # once: a checkpoint hands them out a single time
        except RuntimeError as e:
            if "modified by an inplace operation" not in str(e):
                raise
            raise RuntimeError(
                "the output of an InPlaceABN, which its backward pass needs, was overwritten: use inplace=False in "
                "what follows the layer, such as ReLU(inplace=True); its own activation replaces a ReLU behind it"
            ) from e
        with torch.no_grad():
            return backward(ctx, saved, *gradients)

    return call


class _BatchNormalize(torch.autograd.Function):
    """A training step of one process: from x to y and its statistics, whose part in the gradient is in that of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[float, int, float, bool],
        inplace: bool,
        found: list[Tensor],
    ) -> Tensor:
        if inplace:
            mean, var = kernels(x).batch_normalize_(x, weight, bias, residual, *options)
            ctx.mark_dirty(x)
            y = x
        else:
            y, mean, var = kernels(x).batch_normalize(x, weight, bias, residual, *options)
        found.extend((mean, var))
        ctx.save_for_backward(y, weight, bias, residual, var)
        ctx.options = options
        _, ctx.activation, ctx.param, ctx.signed_scale = options
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, residual, var = saved
        want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
        recover = (weight, bias, residual, *ctx.options)
        want_dz = want_residual and ctx.activation != IDENTITY
        dx = dz = None
        d_affine: tuple[Tensor | None, Tensor | None] = (None, None)
        if want_x:
            dx, dz, *sums = kernels(y).batch_gradient(y, dy, var, want_dz, *recover)
            d_affine = _affine_gradients(ctx, weight, bias, *sums)
        else:  # a frozen producer
            if want_weight or want_bias:
                d_affine = _affine_gradients(ctx, weight, bias, *kernels(y).gradient_sums(y, dy, *recover))
            if want_dz:
                dz = gradient(y, dy, ctx.activation, ctx.param)
        return dx, *d_affine, _residual_gradient(ctx, dy, dz), *(None,) * 3


def _affine_gradients(
    ctx: Any, weight: Tensor | None, bias: Tensor | None, sum_dz: Tensor, sum_dz_xhat: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    d_weight = d_bias = None
    if weight is not None and ctx.needs_input_grad[1]:
        # dγ/dw is sign(w) with sign(0) = +1; the signed scale grows with w everywhere.
        d_weight = sum_dz_xhat if ctx.signed_scale else torch.where(weight < 0, -sum_dz_xhat, sum_dz_xhat)
        d_weight = d_weight.to(weight.dtype)
    if bias is not None and ctx.needs_input_grad[2]:
        d_bias = sum_dz.to(bias.dtype)
    return d_weight, d_bias


def _residual_gradient(ctx: Any, dy: Tensor, dz: Tensor | None) -> Tensor | None:
    if not ctx.needs_input_grad[3]:
        return None
    return dy if ctx.activation == IDENTITY else dz


class _Normalize(torch.autograd.Function):
    """From x and given statistics to y: those of eval mode (`count` None), or of `count` values per channel."""

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
        options: tuple[float, int, float, bool],
        inplace: bool,
        peers: distributed.Peers,
    ) -> Tensor:
        if inplace:
            kernels(x).normalize_(x, mean, var, weight, bias, residual, *options)
            ctx.mark_dirty(x)
            y = x
        else:
            y = kernels(x).normalize(x, mean, var, weight, bias, residual, *options)
        ctx.save_for_backward(y, weight, bias, residual, var, count if isinstance(count, Tensor) else None)
        ctx.count, ctx.options, ctx.peers = (None if isinstance(count, Tensor) else count), options, peers
        _, ctx.activation, ctx.param, ctx.signed_scale = options
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, residual, var, count = saved
        count = ctx.count if count is None else count
        want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
        recover = (weight, bias, residual, *ctx.options)
        d_weight = d_bias = dx = dz = mean_dz = mean_dz_xhat = None
        if want_weight or want_bias or (want_x and count is not None):
            sums = kernels(y).gradient_sums(y, dy, *recover)
            d_weight, d_bias = _affine_gradients(ctx, weight, bias, *sums)
            if want_x and count is not None:
                sums = ctx.peers.add(*sums) if ctx.peers.count > 1 else sums
                mean_dz, mean_dz_xhat = (total / count for total in sums)
        if want_x or want_residual:
            want_dz = want_residual and ctx.activation != IDENTITY
            dx, dz = kernels(y).input_gradient(y, dy, var, mean_dz, mean_dz_xhat, want_dz, *recover)
        return dx, d_weight, d_bias, _residual_gradient(ctx, dy, dz), *(None,) * 6
