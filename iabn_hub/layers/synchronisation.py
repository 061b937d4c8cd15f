"""Turn the layers of a network into synchronised ones, and back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .modules import InPlaceABN, InPlaceABNSync

_logger = logging.getLogger(__name__)


def convert_sync(module: nn.Module, group: Any = None) -> nn.Module:
    """Replace every InPlaceABN within `module` by an InPlaceABNSync over `group`, with the same parameters.

    Layers of a subclass, and parametrised ones, become a subclass of both.

    Returns:
        `module`, changed in place, or the new layer if `module` itself is one.

    Example:
        >>> import torch, iabn_hub
        >>> iabn_hub.convert_sync(torch.nn.Sequential(iabn_hub.InPlaceABN(4)))
        Sequential(
          (0): InPlaceABNSync(4, eps=1e-05, momentum=0.1, affine=True, activation=leaky_relu[0.01])
        )
    """
    return _replaced(module, lambda layer: _to_sync(layer, group), {})


def convert_local(module: nn.Module) -> nn.Module:
    """The way back: replace every InPlaceABNSync within `module` by an InPlaceABN, with the same parameters."""
    return _replaced(module, _to_local, {})


def _replaced(
    module: nn.Module, convert: Callable[[nn.Module], nn.Module], done: dict[int, tuple[nn.Module, nn.Module]]
) -> nn.Module:
    """`module` with every layer within it converted; a layer that occurs in several places stays one layer."""
    if id(module) not in done:
        converted = convert(module)
        done[id(module)] = module, converted  # the first is kept, so that nothing else gets its id
        for name, child in module._modules.items():
            if child is not None:
                converted._modules[name] = _replaced(child, convert, done)
    return done[id(module)][1]


def _to_sync(layer: nn.Module, group: Any) -> nn.Module:
    if not isinstance(layer, InPlaceABN) or isinstance(layer, InPlaceABNSync):
        return layer
    converted = _recreated(layer, _sync_class)
    converted.set_group(group)
    return converted


def _to_local(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, InPlaceABNSync):
        return layer
    if _local_class(parametrize.type_before_parametrizations(layer)) is None:
        _logger.warning("%s is a synchronised class of its own and stays as it is", type(layer).__name__)
        return layer
    converted = _recreated(layer, _local_class)
    del converted.group, converted._compared
    return converted


def _recreated(layer: nn.Module, class_for: Callable[[Any], Any]) -> Any:
    """The layer, with its parameters, as one of another class; parametrisations stay."""
    original: Any = parametrize.type_before_parametrizations(layer)
    cls = class_for(original)
    if type(layer) is not original:  # torch keeps parametrised tensors as properties of a class made for the layer
        members = {n: v for n, v in vars(type(layer)).items() if n not in ("__dict__", "__weakref__", "__doc__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), members)
    created = cls.__new__(cls)
    created.__dict__.update(layer.__dict__)
    created._modules = dict(layer._modules)
    return created


@functools.cache
def _sync_class(cls: Any) -> Any:
    """The synchronised form of InPlaceABN or of a subclass."""
    if cls is InPlaceABN:
        return InPlaceABNSync
    return type(f"{cls.__name__}Sync", (cls, InPlaceABNSync), {"local_class": cls, "__reduce_ex__": _reduce})


def _local_class(cls: Any) -> Any:
    """The class that `_sync_class` made this one of; None for other classes."""
    return InPlaceABN if cls is InPlaceABNSync else vars(cls).get("local_class")


def _reduce(layer: Any, protocol: int) -> tuple[Any, ...]:
    """How pickle stores a layer of a class that cannot be imported."""
    return _empty, (type(layer).local_class,), layer.__dict__


def _empty(cls: Any) -> Any:
    sync = _sync_class(cls)
    return sync.__new__(sync)
