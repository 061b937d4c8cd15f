"""Teach the tools of torch and timm that replace BatchNorm layers what to do with ours.

`ABN` and its subclasses are `_BatchNorm`, so that what looks for BatchNorm finds them. Some functions replace what they
find by a layer without activation, or overlook ours without a word. Importing this package wraps them: on our layers
they do what they mean to, or raise a TypeError; on all others they do what they did before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import timm.layers
import timm.layers.inplace_abn
import timm.layers.norm_act
import timm.layers.split_batchnorm
import timm.utils
import timm.utils.model
import torch.nn.utils.fusion
from torch import nn

from . import layers
from .layers import ABN, InPlaceABN, convert_sync


def _synchronise(layer: ABN, process_group: Any = None) -> nn.Module:
    if not isinstance(layer, InPlaceABN):
        raise TypeError(
            "ABN has no synchronised form: use InPlaceABNSync (in this package's networks norm_layer='iabn_sync')"
        )
    return convert_sync(layer, process_group)


def _freeze(layer: ABN) -> nn.Module:
    layer.freeze_running_stats()
    return layer


def _unfreeze(layer: ABN) -> nn.Module:
    layer.freeze_running_stats(False)
    return layer


def _refuse_split(layer: ABN, *_: Any, **__: Any) -> nn.Module:
    raise TypeError(
        f"convert_splitbn_model would replace {type(layer).__name__} by a BatchNorm without its activation: the layers "
        "of iabn_hub have no split form"
    )


def _wrap(original: Callable[..., nn.Module], ours: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def convert(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        return (ours if isinstance(module, ABN) else original)(module, *arguments, **options)

    return convert


def _guard_fusion(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def fuse(producer: nn.Module, norm: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        if isinstance(norm, ABN):
            raise TypeError(f"{original.__name__} would drop the activation of {type(norm).__name__}")
        return original(producer, norm, *arguments, **options)

    return fuse


_TIMM: tuple[Any, ...] = (
    timm.layers.norm_act, timm.layers.split_batchnorm, timm.layers, timm.utils.model, timm.utils,
)  # fmt: skip


def install() -> None:
    """Wrap the converters in every module that holds them, so that those that call themselves find the wrapped form."""
    for name, ours in (
        ("convert_sync_batchnorm", _synchronise),
        ("convert_splitbn_model", _refuse_split),
        ("freeze_batch_norm_2d", _freeze),
        ("unfreeze_batch_norm_2d", _unfreeze),
    ):
        holders = [module for module in _TIMM if hasattr(module, name)]
        wrapped = _wrap(getattr(holders[0], name), ours)
        for module in holders:
            setattr(module, name, wrapped)

    for name in ("fuse_conv_bn_eval", "fuse_linear_bn_eval"):
        guarded = _guard_fusion(getattr(torch.nn.utils.fusion, name))
        for module in (torch.nn.utils.fusion, torch.nn.utils):
            setattr(module, name, guarded)

    convert = nn.SyncBatchNorm.convert_sync_batchnorm.__func__  # type: ignore[attr-defined]

    @classmethod  # type: ignore[misc]
    @functools.wraps(convert)
    def convert_sync_batchnorm(cls: Any, module: nn.Module, process_group: Any = None) -> Any:
        if isinstance(module, ABN):
            return _synchronise(module, process_group)
        return convert(cls, module, process_group)

    nn.SyncBatchNorm.convert_sync_batchnorm = convert_sync_batchnorm  # type: ignore[method-assign,assignment]


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
