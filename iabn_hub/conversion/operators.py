"""The functions that are computed again rather than having their results kept: cheap, without state, without randomness."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# By name: torch calls one function by many objects (torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__ …).
_UNARY: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu, "relu_": torch.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "hardtanh_": F.hardtanh,
    "leaky_relu": F.leaky_relu, "leaky_relu_": F.leaky_relu, "elu": F.elu, "elu_": F.elu, "celu": F.celu,
    "selu": F.selu, "silu": F.silu, "mish": F.mish, "gelu": F.gelu, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "softplus": F.softplus, "sigmoid": torch.sigmoid, "sigmoid_": torch.sigmoid,
    "tanh": torch.tanh, "tanh_": torch.tanh, "clamp": torch.clamp, "clamp_": torch.clamp,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "add_": torch.add, "__add__": torch.add, "__radd__": torch.add, "__iadd__": torch.add,
    "mul": torch.mul, "mul_": torch.mul, "__mul__": torch.mul, "__rmul__": torch.mul, "__imul__": torch.mul,
}  # fmt: skip
NORMS = {"instance_norm", "group_norm"}
RECOMPUTED = {*_UNARY, *_BINARY, *NORMS, "cat", "concat"}
INPLACE = {name for name in RECOMPUTED if name.endswith("_") and not name.endswith("__")} | {"__iadd__", "__imul__"}
# Where torch.nn.functional takes `inplace` without its name.
_INPLACE_AT = {"leaky_relu": 2, "elu": 2, "celu": 2, "hardtanh": 3}


def overwrites(name: str, args: Any, kwargs: Any) -> bool:
    """Whether this call of the function `name` writes its result to its first argument."""
    if name in INPLACE or kwargs.get("inplace", False):
        return True
    at = _INPLACE_AT.get(name, 1)
    return name in _UNARY and len(args) > at and args[at] is True


def pure(name: str, args: Any, kwargs: Any) -> Callable[..., Tensor] | None:
    """A function of the tensors of this call that computes its result anew; None if there is none."""
    if name in ("cat", "concat"):
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return lambda *tensors: torch.cat(tensors, dim)
    if "out" in kwargs:
        return None
    if name in NORMS:
        return _norm(name, args, kwargs)
    if name in _BINARY:
        return _binary(_BINARY[name], args, kwargs)
    if any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
        return None
    at = _INPLACE_AT.get(name, 1)
    rest = [value for place, value in enumerate(args[1:], 1) if not (place == at and isinstance(value, bool))]
    options = {key: value for key, value in kwargs.items() if key not in ("inplace", "input")}
    function = _UNARY[name]
    return functools.partial(_call, function, rest, options) if rest or options else function


def _call(function: Callable[..., Tensor], rest: list[Any], options: dict[str, Any], t: Tensor) -> Tensor:
    return function(t, *rest, **options)


def _binary(function: Callable[..., Tensor], args: Any, kwargs: Any) -> Callable[..., Tensor] | None:
    if kwargs or len(args) != 2:  # alpha
        return None
    if isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
        return function
    number = args[1] if isinstance(args[0], Tensor) else args[0]
    return functools.partial(_call, function, [number], {})


def _norm(name: str, args: Any, kwargs: Any) -> Callable[..., Tensor] | None:
    """The norm of one tensor; the others are parameters, which do not change before the backward pass."""
    if name == "group_norm":
        values = dict(zip(("num_groups", "weight", "bias", "eps"), args[1:])) | kwargs
    else:
        names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
        values = dict(zip(names, args[1:])) | kwargs
        if not values.get("use_input_stats", True):
            return None
        values |= {"running_mean": None, "running_var": None}
    options = {key: value.detach() if isinstance(value, Tensor) else value for key, value in values.items()}
    options.pop("input", None)
    return functools.partial(_call, getattr(F, name), [], options)
