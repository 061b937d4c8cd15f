"""Convolutional networks that train in half the memory: in-place activated BatchNorm, and networks built on it.

Importing this package registers its models in timm, and teaches the tools that replace BatchNorm layers its own
(`compatibility`). It compiles nothing and touches no network.
"""

# ruff: noqa: E402
from .starting import end_at_interrupt

end_at_interrupt()

from . import compatibility
from .compatibility import install_as_inplace_abn
from .conversion import convert, restore, to_batchnorm
from .layers import (
    ABN,
    InPlaceABN,
    InPlaceABNSync,
    InPlaceGroupNorm,
    InPlaceInstanceNorm,
    active_group,
    convert_local,
    convert_sync,
    inplace_abn,
    inplace_abn_sync,
    inplace_group_norm,
    set_active_group,
    use_backend,
)
from .models import create_model, list_models

__version__ = "0.1.0"

compatibility.install()

__all__ = [
    "ABN",
    "InPlaceABN",
    "InPlaceABNSync",
    "InPlaceGroupNorm",
    "InPlaceInstanceNorm",
    "__version__",
    "active_group",
    "convert",
    "convert_local",
    "convert_sync",
    "create_model",
    "inplace_abn",
    "inplace_abn_sync",
    "inplace_group_norm",
    "install_as_inplace_abn",
    "list_models",
    "restore",
    "set_active_group",
    "to_batchnorm",
    "use_backend",
]
