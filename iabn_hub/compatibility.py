"""Teach the tools of torch and timm that replace BatchNorm layers what to do with ours.

`ABN` and its subclasses are `_BatchNorm`, so that what looks for BatchNorm finds them. Some functions replace what they
find by a layer without activation, or overlook ours without a word. Importing this package wraps them: on our layers
they do what they mean to, or raise a TypeError; on all others they do what they did before.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import timm.layers
import timm.layers.inplace_abn
import timm.layers.norm_act
import timm.layers.split_batchnorm
import timm.utils.model
import torch.nn.utils.fusion
from torch import nn

from . import layers
from .layers import ABN, InPlaceABN, convert_sync


def _synchronise(module: ABN, process_group: Any = None) -> nn.Module:
    if not isinstance(module, InPlaceABN):
        raise TypeError(
            "ABN has no synchronised form: use InPlaceABNSync (in this package's networks norm_layer='iabn_sync')"
        )
    return convert_sync(module, process_group)


def _freeze(module: ABN) -> nn.Module:
    module.freeze_running_stats()
    return module


def _unfreeze(module: ABN) -> nn.Module:
    module.freeze_running_stats(False)
    return module


def _refuse_split(module: ABN, *_: Any, **__: Any) -> nn.Module:
    raise TypeError(
        f"convert_splitbn_model would replace {type(module).__name__} by a BatchNorm without its activation: the "
        "layers of iabn_hub have no split form"
    )


def _refuse_fusion(*_: Any, **__: Any) -> nn.Module:
    raise TypeError("a layer of iabn_hub cannot be folded into what stands before it, which would drop the activation")


def _wrap(original: Callable[..., Any], parameter: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, which calls `ours` instead where its argument `parameter` is one of our layers."""
    position = list(inspect.signature(original).parameters).index(parameter)

    @functools.wraps(original)
    def convert(*arguments: Any, **options: Any) -> Any:
        given = arguments[position] if len(arguments) > position else options.get(parameter)
        return (ours if isinstance(given, ABN) else original)(*arguments, **options)

    return convert


# What is wrapped: its parameter for the layer, what is done instead, and the modules that hold it, so that those that
# call themselves find the wrapped form.
_TIMM = (timm.layers.norm_act, timm.layers.split_batchnorm, timm.layers, timm.utils.model)
_TORCH = (torch.nn.utils.fusion, torch.nn.utils)
_WRAPPED: tuple[tuple[str, str, Callable[..., Any], tuple[Any, ...]], ...] = (
    ("convert_sync_batchnorm", "module", _synchronise, _TIMM),
    ("convert_splitbn_model", "module", _refuse_split, _TIMM),
    ("freeze_batch_norm_2d", "module", _freeze, _TIMM),
    ("unfreeze_batch_norm_2d", "module", _unfreeze, _TIMM),
    ("fuse_conv_bn_eval", "bn", _refuse_fusion, _TORCH),
    ("fuse_linear_bn_eval", "bn", _refuse_fusion, _TORCH),
)


def install() -> None:
    """Wrap the converters of torch and timm."""
    for name, parameter, ours, modules in _WRAPPED:
        holders = [module for module in modules if hasattr(module, name)]
        wrapped = _wrap(getattr(holders[0], name), parameter, ours)
        for module in holders:
            setattr(module, name, wrapped)
    original = nn.SyncBatchNorm.convert_sync_batchnorm.__func__  # type: ignore[attr-defined]
    synchronise = _wrap(original, "module", lambda cls, *arguments, **options: _synchronise(*arguments, **options))
    nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(synchronise)  # type: ignore[method-assign,assignment]


# The modules of the package inplace_abn, and what users import from them.
_INPLACE_ABN = {
    "inplace_abn.abn": ("ABN", "InPlaceABN", "InPlaceABNSync"),
    "inplace_abn.functions": ("inplace_abn", "inplace_abn_sync"),
    "inplace_abn.group": ("active_group", "set_active_group"),
}


def install_as_inplace_abn() -> None:
    """Let `import inplace_abn` and `from inplace_abn.abn import InPlaceABN` find this package's layers.

    The in-place options of timm (`norm_layer='inplaceabn'`) and of segmentation_models_pytorch
    (`decoder_use_norm='inplace'`) use them as well. Call it before a network is built. It replaces inplace_abn, if that
    is installed, within this process.

    Example:
        >>> import iabn_hub
        >>> iabn_hub.install_as_inplace_abn()
        >>> from inplace_abn.abn import InPlaceABN
        >>> InPlaceABN is iabn_hub.InPlaceABN
        True
    """
    package = ModuleType("inplace_abn", "The layers of iabn_hub under the names of inplace_abn.")
    package.__path__ = []
    sys.modules["inplace_abn"] = package
    for path, names in _INPLACE_ABN.items():
        module = ModuleType(path)
        sys.modules[path] = module
        setattr(package, path.rpartition(".")[2], module)
        for name in names:
            for holder in (module, package):
                setattr(holder, name, getattr(layers, name))

    for name in ("inplace_abn", "inplace_abn_sync"):
        setattr(timm.layers.inplace_abn, name, getattr(layers, name))
    timm.layers.inplace_abn.has_iabn = True
    blocks = sys.modules.get("segmentation_models_pytorch.base.modules")  # looked for the package when it was imported
    if blocks is not None:
        blocks.InPlaceABN = InPlaceABN  # type: ignore[attr-defined]
