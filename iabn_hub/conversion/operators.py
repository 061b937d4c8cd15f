"""The functions whose results are computed again rather than kept: cheap, without state, without randomness."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.activations import ELU, HARDSWISH, LEAKY_RELU, RELU6, SILU

# By name: torch calls one function by many objects (torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__ …).
_UNARY: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu, "elu": F.elu,
    "celu": F.celu, "selu": F.selu, "silu": F.silu, "mish": F.mish, "gelu": F.gelu, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "softplus": F.softplus, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "clamp": torch.clamp, "neg": torch.neg, "pad": F.pad, "interpolate": F.interpolate,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "truediv": torch.div,
}  # fmt: skip
# Of the first tensor; the others are weight and bias.
_NORMS: dict[str, tuple[str, ...]] = {
    "group_norm": ("num_groups", "weight", "bias", "eps"),
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
}
_INPLACE_AT = {"leaky_relu": 2, "elu": 2, "celu": 2, "hardtanh": 3}  # where `inplace` comes without its name


def _base_names() -> Iterator[tuple[str, str, bool]]:
    """Each name that torch uses, the name above, and whether it stands for overwriting."""
    for name in (*_UNARY, *_NORMS, "cat"):
        yield name, name, False
        yield f"{name}_", name, True
    yield "concat", "cat", False
    for name in _BINARY:
        yield name, name, False
        yield f"{name}_", name, True
        yield f"__{name}__", name, False
        yield f"__i{name}__", name, True
    for name in ("add", "mul"):  # the others do not commute: torch calls __rsub__ and so on, which are kept
        yield f"__r{name}__", name, False


_NAMES = {name: (base, overwrites) for name, base, overwrites in _base_names()}


class Call:
    """A call of one of these functions.

    Attributes:
        function: of the tensors below, computes the result anew.
        tensors: what it is computed from.
        overwrites: the result is written to the first of them.
        activation: number and parameter of the kernels, if it is one of theirs.
    """

    def __init__(self, name: str, function: Callable[..., Tensor], tensors: list[Tensor], overwrites: bool) -> None:
        self.name = name
        self.function = function
        self.tensors = tensors
        self.overwrites = overwrites
        self.activation: tuple[int, float] | None = None
        self.is_norm = name in _NORMS


class Concatenation:
    """Its arguments in one tensor: what else concatenates them needs the same parts, as in DenseNet."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, self.dim)


def is_known(function: Any, name: str) -> bool:
    """Whether this is one of torch's functions above, and not one of another library by the same name."""
    if name not in _NAMES or isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return False
    module = getattr(function, "__module__", None)
    return module is None or module.partition(".")[0] == "torch"


def read_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """What this call computes, or None where it cannot be computed again."""
    base, overwrites = _NAMES[name]
    if "out" in kwargs:
        return None
    if base == "cat":
        values = {"tensors": None, "dim": 0} | dict(zip(("tensors", "dim"), args)) | kwargs
        tensors, dim = values.pop("tensors"), values.pop("dim")
        dim = values.pop("axis", dim)
        if values or not isinstance(tensors, list | tuple) or not isinstance(dim, int):
            return None
        return Call(base, Concatenation(dim), list(tensors), False)
    if base in _BINARY:
        return _binary(base, args, kwargs, overwrites)
    if not args or not isinstance(args[0], Tensor):
        return None
    if base in _NORMS:
        return _norm(base, args, kwargs)
    return _unary(base, args, kwargs, overwrites)


def _unary(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], overwrites: bool) -> Call | None:
    if any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
        return None
    at = _INPLACE_AT.get(name, 1)
    overwrites = overwrites or bool(kwargs.get("inplace")) or (len(args) > at and args[at] is True)
    rest = [value for place, value in enumerate(args[1:], 1) if not (place == at and isinstance(value, bool))]
    options = {key: value for key, value in kwargs.items() if key != "inplace"}
    function = _UNARY[name]
    call = Call(name, _partial(function, rest, options), [args[0]], overwrites)
    call.activation = _activation(name, rest, options)
    return call


def _partial(function: Callable[..., Tensor], rest: list[Any], options: dict[str, Any]) -> Callable[..., Tensor]:
    return functools.partial(_call, function, rest, options) if rest or options else function


def _call(function: Callable[..., Tensor], rest: list[Any], options: dict[str, Any], t: Tensor) -> Tensor:
    return function(t, *rest, **options)


def _activation(name: str, rest: list[Any], options: dict[str, Any]) -> tuple[int, float] | None:
    """As the kernels know it; None if they do not."""
    if name == "relu":
        return LEAKY_RELU, 0.0
    if name in ("leaky_relu", "elu"):
        key, usual, number = ("negative_slope", 0.01, LEAKY_RELU) if name == "leaky_relu" else ("alpha", 1.0, ELU)
        value = rest[0] if rest else options.get(key, usual)
        simple = len(rest) < 2 and not options.keys() - {key} and value >= 0
        return (number, float(value)) if simple else None
    if name == "hardtanh":
        low, high = (*rest, None, None)[:2]
        low, high = (
            options.get("min_val", -1.0 if low is None else low),
            options.get("max_val", 1.0 if high is None else high),
        )
        return (RELU6, 0.0) if (low, high) == (0, 6) else None
    number_of = {"silu": SILU, "hardswish": HARDSWISH, "relu6": RELU6}
    return (number_of[name], 0.0) if name in number_of and not rest and not options else None


def _binary(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], overwrites: bool) -> Call | None:
    if kwargs or len(args) != 2:  # alpha, rounding_mode
        return None
    function = _BINARY[name]
    first, second = args
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return Call(name, function, [first, second], overwrites)
    if isinstance(first, Tensor):
        return Call(name, functools.partial(_call, function, [second], {}), [first], overwrites)
    return None


def _norm(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    values = dict(zip(_NORMS[name], args[1:])) | kwargs
    # Copies: a sharded parameter may be away when the result is computed again.
    options = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in values.items()}
    return Call(name, functools.partial(_call, getattr(F, name), [], options), [args[0]], False)


def overwritten(function: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that a function may overwrite: torch's the first one and `out`, other operators any of them."""
    any_of_them = isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    for value in (*(args if any_of_them else args[:1]), *kwargs.values()):
        for t in value if isinstance(value, list | tuple) else (value,):
            if isinstance(t, Tensor):
                yield t


def overwrites(name: str) -> bool:
    """Whether a function of this name certainly overwrites its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name in _NAMES and _NAMES[name][0] in _BINARY)
    return name.endswith("_")


def may_overwrite(name: str, args: Any, kwargs: Any) -> bool:
    return (
        name.endswith("_")
        or name.startswith("_foreach")
        or "out" in kwargs
        or kwargs.get("inplace") is True
        or any(a is True for a in args)
    )
