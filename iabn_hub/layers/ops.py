"""The operators of the layer: their contracts, and what they return without data. No maths.

Each operator works channel by channel on tensors of shape (N, C, *). "Accumulate dtype" is float64
for float64 activations and float32 for all others. The activation is an integer of `activations`,
and γ is |weight| + eps, or with `signed_scale` weight itself. The recovery of x̂ divides by γ, but
by no less than 1e-5.
`weight` and `bias` of None stand for γ = 1 and β = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "iabn_hub"
lib = torch.library.Library(NAMESPACE, "DEF")

_SCALE_AND_ACTIVATION = "float eps, int activation, float activation_param, bool signed_scale"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_activation_shape(x: Tensor) -> None:
    torch._check(x.dim() >= 2, lambda: f"the input must be (N, C, *), got shape {tuple(x.shape)}")


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.size(1), dtype=accumulate_dtype(x.dtype))


# Statistics of one batch.
#   x     (N, C, *)  any floating dtype, any strides
#   mean  (C,)       accumulate dtype; 0 for an empty batch
#   var   (C,)       biased, same dtype; 0 for an empty batch
lib.define("statistics(Tensor x) -> (Tensor mean, Tensor var)")


@torch.library.register_fake(f"{NAMESPACE}::statistics", lib=lib)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_activation_shape(x)
    return _per_channel(x), _per_channel(x)


# y = act(γ·(x - mean)/sqrt(var + eps) + β [+ residual])
#   x, residual   (N, C, *)  same shape; y has the dtype of x
#   mean, var     (C,)       any floating dtype
#   weight, bias  (C,)       any floating dtype
# `normalize` writes a new tensor, `normalize_` overwrites x.
_AFFINE = f"Tensor? weight, Tensor? bias, Tensor? residual, {_SCALE_AND_ACTIVATION}"
lib.define(f"normalize(Tensor x, Tensor mean, Tensor var, {_AFFINE}) -> Tensor")
lib.define(f"normalize_(Tensor(a!) x, Tensor mean, Tensor var, {_AFFINE}) -> ()")


@torch.library.register_fake(f"{NAMESPACE}::normalize", lib=lib)
def _(x: Tensor, *args: object) -> Tensor:
    _check_activation_shape(x)
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::normalize_", lib=lib)
def _(x: Tensor, *args: object) -> None:
    _check_activation_shape(x)


# The two above in one, for a training step: the statistics of x, then y from x and them. What is given of the rest is
# overwritten:
#   running_mean, running_var  (C,)  running += momentum·(batch - running), the variance unbiased; not by an empty batch
#   num_batches                ()    int64; one more
_RUNNING = "Tensor(b!)? running_mean=None, Tensor(c!)? running_var=None, Tensor(d!)? num_batches=None, float momentum=0"
lib.define(f"batch_normalize(Tensor x, {_AFFINE}, {_RUNNING}) -> (Tensor y, Tensor mean, Tensor var)")
lib.define(f"batch_normalize_(Tensor(a!) x, {_AFFINE}, {_RUNNING}) -> (Tensor mean, Tensor var)")


@torch.library.register_fake(f"{NAMESPACE}::batch_normalize", lib=lib)
def _(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    _check_activation_shape(x)
    return torch.empty_like(x), _per_channel(x), _per_channel(x)


@torch.library.register_fake(f"{NAMESPACE}::batch_normalize_", lib=lib)
def _(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _check_activation_shape(x)
    return _per_channel(x), _per_channel(x)


# First pass of the backward: with dz = dy·act'(z) and x̂ = (act⁻¹(y) - residual - β)/γ,
#   sum_dz       (C,)  Σ dz      the gradient of β
#   sum_dz_xhat  (C,)  Σ dz·x̂   the gradient of γ
#   y, dy        (N, C, *)  output and its gradient
lib.define(f"gradient_sums(Tensor y, Tensor dy, {_AFFINE}) -> (Tensor sum_dz, Tensor sum_dz_xhat)")


@torch.library.register_fake(f"{NAMESPACE}::gradient_sums", lib=lib)
def _(y: Tensor, dy: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _check_activation_shape(y)
    return _per_channel(y), _per_channel(y)


# Second pass of the backward: dx = γ/sqrt(var + eps)·(dz - mean_dz - x̂·mean_dz_xhat).
#   var                    (C,)       what the forward normalised with
#   mean_dz, mean_dz_xhat  (C,)       accumulate dtype; None in eval mode, where they are 0
#   dx                     (N, C, *)  a new tensor with dtype and strides of y
#   dz                     (N, C, *)  the gradient of the residual, or (0,) unless `want_dz`
lib.define(
    f"input_gradient(Tensor y, Tensor dy, Tensor var, Tensor? mean_dz, Tensor? mean_dz_xhat, bool want_dz, {_AFFINE})"
    " -> (Tensor dx, Tensor dz)"
)


@torch.library.register_fake(f"{NAMESPACE}::input_gradient", lib=lib)
def _(
    y: Tensor, dy: Tensor, var: Tensor, mean_dz: Tensor | None, mean_dz_xhat: Tensor | None, want_dz: bool, *a: object
) -> tuple[Tensor, Tensor]:
    _check_activation_shape(y)
    return torch.empty_like(y), torch.empty_like(y) if want_dz else y.new_empty(0)


# Both passes in one, for a training step of one process.
#   d_weight, d_bias  (C,)  of the dtypes of weight and bias, or the accumulate dtype where there are none.
#                           dγ/dweight is the sign of weight, +1 at 0; with signed_scale 1
lib.define(
    f"batch_gradient(Tensor y, Tensor dy, Tensor var, bool want_dz, {_AFFINE})"
    " -> (Tensor dx, Tensor dz, Tensor d_weight, Tensor d_bias)"
)


@torch.library.register_fake(f"{NAMESPACE}::batch_gradient", lib=lib)
def _(
    y: Tensor, dy: Tensor, var: Tensor, want_dz: bool, weight: Tensor | None, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_activation_shape(y)
    dz = torch.empty_like(y) if want_dz else y.new_empty(0)
    d_weight, d_bias = (_per_channel(y) if v is None else v.new_empty(y.size(1)) for v in (weight, bias))
    return torch.empty_like(y), dz, d_weight, d_bias


# Both passes in one from the input of the layer, for a layer that keeps x and not y.
#   x, dy     (N, C, *)  what went into the layer, and the gradient of what came out; there is no residual
#   mean, var (C,)       what the forward normalised with; γ is weight itself
#   centred              mean and var are those of x: dx = γ/sqrt(var + eps)·(dz - mean(dz) - x̂·mean(dz·x̂)); else given
#                        numbers (eval mode), and dx = γ/sqrt(var + eps)·dz
lib.define(
    "gradient_from_input(Tensor x, Tensor dy, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps,"
    " int activation, float activation_param, bool centred) -> (Tensor dx, Tensor sum_dz, Tensor sum_dz_xhat)"
)


@torch.library.register_fake(f"{NAMESPACE}::gradient_from_input", lib=lib)
def _(x: Tensor, dy: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    _check_activation_shape(x)
    return torch.empty_like(x), _per_channel(x), _per_channel(x)


# running += momentum·(batch - running), for the variance with the unbiased var·correction.
#   running_mean, running_var  (C,)  any floating dtype; overwritten
#   mean, var                  (C,)  accumulate dtype
lib.define(
    "update_statistics_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum,"
    " float correction) -> ()"
)


@torch.library.register_fake(f"{NAMESPACE}::update_statistics_", lib=lib)
def _(running_mean: Tensor, *args: object) -> None:
    pass


statistics = torch.ops.iabn_hub.statistics
normalize = torch.ops.iabn_hub.normalize
normalize_ = torch.ops.iabn_hub.normalize_
batch_normalize = torch.ops.iabn_hub.batch_normalize
batch_normalize_ = torch.ops.iabn_hub.batch_normalize_
gradient_sums = torch.ops.iabn_hub.gradient_sums
input_gradient = torch.ops.iabn_hub.input_gradient
batch_gradient = torch.ops.iabn_hub.batch_gradient
gradient_from_input = torch.ops.iabn_hub.gradient_from_input
update_statistics_ = torch.ops.iabn_hub.update_statistics_
