"""The layer from standard operators alone.

It is what `ABN` computes, and what in-place ABN becomes wherever its own operators cannot go: TorchScript, tracing,
export, the transforms of torch.func, and forward-mode differentiation. It keeps its input for the backward pass.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F


def batch_norm_act(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    activation_param: float,
    residual: Optional[Tensor],
) -> Tensor:
    """act(weight·(x - μ)/sqrt(σ² + eps) + bias [+ residual]) as a new tensor; the arguments are those of `inplace_abn`.

    TorchScript compiles it, and `activation` may be 'relu'.
    """
    mean, var = running_mean, running_var
    if x.dtype == torch.float64:  # the operator wants one dtype then
        mean = mean.double() if mean is not None else None
        var = var.double() if var is not None else None
        weight = weight.double() if weight is not None else None
        bias = bias.double() if bias is not None else None
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    if training and running_mean is not None and mean is not None and running_mean.dtype != mean.dtype:
        running_mean.copy_(mean)
    if training and running_var is not None and var is not None and running_var.dtype != var.dtype:
        running_var.copy_(var)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return activate(y, activation, activation_param)


def activate(y: Tensor, activation: str, activation_param: float) -> Tensor:
    """act(y), which overwrites y; TorchScript compiles it."""
    if activation == "relu":
        return F.relu(y, inplace=True)
    if activation == "leaky_relu":
        return F.leaky_relu(y, activation_param, inplace=True)
    if activation == "elu":
        return F.elu(y, activation_param, inplace=True)
    return y
