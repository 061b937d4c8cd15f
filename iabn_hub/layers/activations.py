"""The activations of the operators, and which of them can be undone from their output."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# The operators take the activation as an integer, so that their schema needs no strings.
# The last three have no inverse: in the backward pass they need the input of the norm (`gradient_from_input`).
IDENTITY, LEAKY_RELU, ELU, SILU, HARDSWISH, RELU6 = range(6)

INVERTIBLE = {"identity": IDENTITY, "leaky_relu": LEAKY_RELU, "elu": ELU}
ACTIVATIONS = (*INVERTIBLE, "relu")


def check_activation(name: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError unless `name` is one of `known`."""
    if name == "none":
        raise ValueError("activation 'none' is called 'identity'")
    if name not in known:
        raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(known)}")


def activation_number(name: str, param: float, invertible: bool = True) -> int:
    """The number the operators know an activation by.

    Args:
        invertible: a gradient is needed; a slope or an alpha of 0 will do otherwise.

    Raises:
        ValueError: the activation is unknown, or cannot be undone. Says what to use instead.
    """
    if name == "relu":
        raise ValueError(
            "activation 'relu' cannot be inverted: it maps every negative value to 0, so the backward pass could not "
            "recover its input. Use 'leaky_relu' (a slope of 0.01 is the usual choice), 'elu' or 'identity', "
            "or ABN, which keeps its input and accepts 'relu'"
        )
    check_activation(name, tuple(INVERTIBLE))
    if name == "identity":
        return INVERTIBLE[name]
    what = "negative slope" if name == "leaky_relu" else "alpha"
    if not 0 <= param < math.inf:
        raise ValueError(f"activation_param is {param}: the {what} of {name} must be positive")
    if invertible and param == 0:
        raise ValueError(
            f"activation_param is 0, and {name} with a {what} of 0 cannot be inverted: it maps every negative value to "
            "0, so the backward pass could not recover its input. Without a gradient (eval mode under torch.no_grad) "
            "the layer runs. To train, use activation_param=0.01 (also as an attribute of a layer that "
            "exists), or ABN, which keeps its input"
        )
    return INVERTIBLE[name]


def activate_(z: Tensor, activation: int, param: float) -> Tensor:
    """Overwrite z, any shape, with act(z)."""
    if activation == LEAKY_RELU:
        return F.leaky_relu_(z, param)
    if activation == ELU:
        return F.elu_(z, param)
    if activation in (SILU, HARDSWISH, RELU6):
        return _WITHOUT_INVERSE[activation](z, inplace=True)
    return z


_WITHOUT_INVERSE = {SILU: F.silu, HARDSWISH: F.hardswish, RELU6: F.relu6}


def invert(y: Tensor, activation: int, param: float, eps: float) -> Tensor:
    """act⁻¹(y) as a new tensor; `eps` is the machine epsilon of the dtype that y was stored in.

    A saturated ELU is stored as -alpha, rounded, whose inverse is -inf or none. The largest z that rounds
    there, log(eps / 4), stands in for it, so that x̂ stays finite (its gradient is 0 anyway).
    """
    if activation == LEAKY_RELU:
        return torch.where(y < 0, y / param, y)
    if activation == ELU:
        return torch.where(y < 0, torch.log1p((y / param).clamp(min=-1)).clamp(min=math.log(eps / 4)), y)
    return y.clone()


def gradient(y: Tensor, dy: Tensor, activation: int, param: float) -> Tensor:
    """dy · act'(act⁻¹(y)) as a new tensor; the derivative is known from the output alone."""
    if activation == LEAKY_RELU:
        return torch.where(y > 0, dy, dy * param)
    if activation == ELU:
        return torch.where(y > 0, dy, dy * (y + param).clamp(min=0))
    return dy.clone()


def gradient_at(z: Tensor, dy: Tensor, activation: int, param: float) -> Tensor:
    """dy · act'(z), where z is known."""
    if activation == LEAKY_RELU:
        return torch.where(z > 0, dy, dy * param)
    if activation == ELU:
        return torch.where(z > 0, dy, dy * param * z.exp())
    if activation == SILU:
        sigmoid = z.sigmoid()
        return dy * (sigmoid * (1 + z * (1 - sigmoid)))
    if activation == HARDSWISH:
        return dy * torch.where(z <= -3, 0, torch.where(z >= 3, 1, z / 3 + 0.5))
    if activation == RELU6:
        return torch.where((z > 0) & (z < 6), dy, 0)
    return dy.clone()
