"""In-place activated batch normalisation as functions: `inplace_abn` and `inplace_abn_sync`.

Rota Bulò, Porzi, Kontschieder: In-Place Activated BatchNorm for Memory-Optimized Training of DNNs,
CVPR 2018; the backward pass is the paper's "InPlace-ABN II" (section 3), which recovers x̂ from the output.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import distributed, reference
from .activations import activation_number
from .autograd import (
    BatchNormalize,
    Normalize,
    Options,
    Running,
    TracedBatchNormalize,
    batch_normalize,
    calls_operators,
    kernels,
    normalize,
)  # fmt: skip
from .overwriting import may_overwrite
from .standard import batch_norm_act


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
    keep_input: bool | Tensor = False,
) -> Tensor:
    """Batch normalisation, an optional residual join, and an invertible activation; keeps only its output.

    Computes ``y = act(γ·(x - μ)/sqrt(σ² + eps) + β [+ residual])`` per channel, where γ is ``|weight| + eps``
    and β is ``bias``. For the backward pass it keeps y (and the residual, by reference), not x.

    Args:
        x: shape (N, C) or (N, C, *), float16, bfloat16, float32 or float64, any strides. Overwritten with the
            result unless ``inplace=False``, or unless that would do harm (x is a leaf that requires a gradient, a
            view that autograd protects, the input of a checkpointed part, …), or in compiled code.
        weight: shape (C,), or None for γ = 1. May be of another floating dtype than x.
        bias: shape (C,), or None for β = 0.
        running_mean, running_var: shape (C,), used in eval mode; in training updated in place with
            ``running += momentum·(batch - running)``, the variance unbiased. None: not tracked.
        training: use the statistics of this batch instead of the running ones.
        momentum: weight of this batch in the running statistics, a number or a tensor of one element.
        eps: added to the variance and to the scale.
        activation: ``leaky_relu``, ``elu`` or ``identity``.
        activation_param: negative slope of leaky_relu, alpha of elu; positive, or 0 where no gradient is needed.
        residual: same shape as x, any floating dtype; added before the activation. Not overwritten.
        inplace: False writes the result to a new tensor and leaves x alone; what is kept stays the same.
        signed_scale: γ is ``weight`` itself, so that weights of a standard BatchNorm fit.
        keep_input: keep x for the backward pass as well, and take x̂ from it: True, or indices (K,) of the channels
            to do so for. What y tells of x̂ has an error of about ulp(y)/(2·|γ|), which is too much where γ is near 0.

    Returns:
        y, with shape and dtype of x: x itself where that was overwritten.

    Raises:
        ValueError: wrong shapes, one value per channel in training, an activation without an inverse where a
            gradient is needed, or eval mode without running statistics.
        TypeError: x is not of a floating dtype.

    Example:
        >>> import torch, iabn_hub
        >>> x = torch.randn(2, 4, 8, 8)
        >>> y = iabn_hub.inplace_abn(x, torch.ones(4), torch.zeros(4), None, None, activation="identity")
        >>> y is x, y.mean((0, 2, 3)).abs().max().item() < 1e-5
        (True, True)
    """
    return forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, activation_param,
        residual, inplace, signed_scale, keep_input, distributed.ALONE,
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
    keep_input: bool | Tensor = False,
) -> Tensor:
    """`inplace_abn` with batch statistics over all processes of a group.

    One collective in the forward pass, one in the backward pass if x needs a gradient, none in eval mode. Batches may
    differ in size between the processes, and be empty. Without a process group, or outside of the group, it is
    `inplace_abn`. The gradients of weight and bias are those of this process, as DistributedDataParallel expects.

    Args:
        group: a `torch.distributed` group, or None for the default one. The other arguments are those
            of `inplace_abn`.
    """
    return forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, activation_param,
        residual, inplace, signed_scale, keep_input, distributed.Peers.of(group) if training else distributed.ALONE,
    )  # fmt: skip


Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # x, weight, bias, residual


def forward(
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
    keep_input: bool | Tensor,
    peers: distributed.Peers,
    num_batches: Tensor | None = None,
) -> Tensor:
    """`inplace_abn` among `peers`; counts the batch in `num_batches` (), int64, in training."""
    with_gradient = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    compiling = torch.compiler.is_compiling()
    number = activation_number if compiling else _activation_number
    act = number(activation, activation_param, with_gradient)
    _check(x, weight, bias, running_mean, running_var, residual)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "eval mode needs running_mean and running_var; pass training=True to use the batch instead"
            )
        num_batches = None
    if needs_standard_operators(x, weight, bias, residual):
        if training and peers.count > 1:
            raise RuntimeError("a synchronised layer in training cannot be traced or transformed: use eval mode")
        scale = None if weight is None else reference.effective_scale(weight, eps, signed_scale)
        y = batch_norm_act(
            x, scale, bias, running_mean, running_var, training, float(momentum), eps, activation, activation_param,
            residual,
        )  # fmt: skip
        return _counted(y, num_batches)
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    keep = None
    if with_gradient and (isinstance(keep_input, Tensor) or keep_input):
        keep = keep_input if isinstance(keep_input, Tensor) else torch.arange(x.size(1), device=x.device)
    everything = keep is not None and keep.numel() == x.size(1)  # then x is kept as it is
    # A compiler plans the memory itself. What is saved for the backward pass is the output either way.
    inplace = inplace and not compiling and not everything and may_overwrite(x, residual)
    options = (eps, act, activation_param, signed_scale)

    tensors = (x, weight, bias, residual)
    if not training and running_mean is not None and running_var is not None:
        # Copies of (C,), if a backward pass follows: the running statistics may move on before it.
        mean, var = (v.clone() if with_gradient else v for v in (running_mean, running_var))
        return _normalize(tensors, mean, var, None, options, inplace, distributed.ALONE, keep, with_gradient)
    if peers.count > 1 or keep is not None or compiling:
        y = _in_steps(tensors, running_mean, running_var, momentum, options, inplace, peers, keep, with_gradient)
        return _counted(y, num_batches)
    running = (running_mean, running_var, num_batches, momentum)
    return _in_one(tensors, running, options, inplace, with_gradient)


def _counted(y: Tensor, num_batches: Tensor | None) -> Tensor:
    if num_batches is not None:
        num_batches.add_(1)
    return y


def _in_one(
    tensors: Tensors,
    running: tuple[Tensor | None, Tensor | None, Tensor | None, float | Tensor],
    options: Options,
    inplace: bool,
    with_gradient: bool,
) -> Tensor:
    """A training step of one process: one operator, which also counts where it can, and renews the running statistics.

    Not so where momentum is on the device.
    """
    x = tensors[0]
    if x.size(0) == 1 and values_per_channel(x) == 1:
        raise one_value_per_channel(x)
    running_mean, running_var, num_batches, momentum = running
    counts = num_batches is not None and num_batches.dtype == torch.int64 and num_batches.get_device() == x.get_device()
    counted = num_batches if counts else None
    found: list[Tensor] | None = None
    renewed: Running
    if isinstance(momentum, Tensor):
        found, renewed = [], (None, None, counted, 0.0)
    else:
        renewed = (running_mean, running_var, counted, momentum)
    y: Tensor
    if with_gradient:
        y = BatchNormalize.apply(*tensors, options, inplace, renewed, found)
    else:
        y, mean, var = batch_normalize(*tensors, options, inplace, renewed)
        if found is not None:
            found.extend((mean, var))
        if inplace:
            _overwritten(y)
    torch.autograd.graph.increment_version([v for v in renewed[:3] if v is not None and not v.is_inference()])
    if found is not None and running_mean is not None and running_var is not None:
        with torch.no_grad():
            track_statistics(running_mean, running_var, found[0], found[1], values_per_channel(x), momentum)
    return y if counts else _counted(y, num_batches)


# A refused combination is not remembered.
_activation_number = functools.lru_cache(maxsize=64)(activation_number)


def _in_steps(
    tensors: Tensors,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    options: Options,
    inplace: bool,
    peers: distributed.Peers,
    keep: Tensor | None,
    with_gradient: bool,
) -> Tensor:
    """A training step whose statistics are those of several processes, or whose parts a compiler should see."""
    x = tensors[0]
    count: int | Tensor = values_per_channel(x)
    if count == 1 and peers.count == 1:
        raise one_value_per_channel(x)
    if peers.count == 1 and keep is None and torch.compiler.is_compiling() and calls_operators(x):
        y, mean, var = TracedBatchNormalize.apply(*tensors, options)
    else:
        with torch.no_grad():
            mean, var = kernels(x).statistics(x.detach())
            if peers.count > 1:
                mean, var, count = peers.merge_statistics(mean, var, values_per_channel(x))
        y = _normalize(tensors, mean, var, count, options, inplace, peers, keep, with_gradient)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            track_statistics(running_mean, running_var, mean, var, count, momentum)
    return y


def values_per_channel(x: Tensor) -> int:
    return x.numel() // max(1, x.size(1))


def _normalize(
    tensors: Tensors,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor | None,
    options: Options,
    inplace: bool,
    peers: distributed.Peers,
    keep: Tensor | None,
    with_gradient: bool,
) -> Tensor:
    y: Tensor
    if with_gradient:
        y = Normalize.apply(*tensors, mean, var, count, options, inplace, peers, keep)
        return y
    x, weight, bias, residual = tensors
    y = normalize(x, mean, var, weight, bias, residual, options, inplace)
    return _overwritten(y) if inplace else y


def needs_standard_operators(*tensors: Tensor | None) -> bool:
    """Whether an exporter, a tracer or a transform is at work, which the layer's own operators have no rules for."""
    if torch.compiler.is_compiling():
        exporting: bool = torch.compiler._is_exporting_flag  # is_exporting() is True in all compiled code of torch 2.10
        return exporting
    if torch._C._get_tracing_state() or torch._C._functorch.maybe_current_level() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _overwritten(x: Tensor) -> Tensor:
    """x, after an operator has written to it unseen by autograd."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"the input must be of a floating dtype, got {x.dtype}")
    if torch._C._get_tracing_state():
        return  # comparing sizes would bind the trace to them
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"the input must be (N, C) or (N, C, *), got shape {tuple(shape)}")
    channels = shape[1:2]
    for v in (weight, bias, running_mean, running_var):
        if v is not None and v.shape != channels:
            names = ("weight", "bias", "running_mean", "running_var")
            given = (weight, bias, running_mean, running_var)
            name = next(name for name, each in zip(names, given) if each is v)
            raise ValueError(
                f"{name} has shape {tuple(v.shape)}, but the input {tuple(shape)} has {x.size(1)} channels"
            )
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, the input {tuple(shape)}: they must be equal")


def one_value_per_channel(x: Tensor) -> ValueError:
    return ValueError(
        f"training needs more than one value per channel, got an input of shape {tuple(x.shape)}: "
        "use a larger batch, or eval() to normalise with the running statistics"
    )


def track_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int | Tensor, momentum: float | Tensor
) -> None:
    if isinstance(count, int) and count == 0:
        return  # an empty batch says nothing, as in BatchNorm
    correction: Any
    if isinstance(count, Tensor):  # one value in all processes together has no variance
        momentum, correction = momentum * (count > 1).to(var.dtype), count / (count - 1).clamp(min=1)
    else:
        correction = count / (count - 1)
    if not isinstance(count, Tensor) and not isinstance(momentum, Tensor):
        update = reference if torch.compiler.is_compiling() else kernels(mean)
        update.update_statistics_(running_mean, running_var, mean, var, momentum, correction)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version((running_mean, running_var))
        return
    for running, batch, share in ((running_mean, mean, momentum), (running_var, var, momentum * correction)):
        running.mul_(1 - momentum).add_((batch * share).to(running.dtype))
