"""In-place activated batch normalisation: modules, functions, and the operators under them."""

from . import reference as _default_kernels  # noqa: F401  registers the operators' kernels
from .functional import inplace_abn, inplace_abn_sync
from .modules import ABN, InPlaceABN, InPlaceABNSync

__all__ = ["ABN", "InPlaceABN", "InPlaceABNSync", "inplace_abn", "inplace_abn_sync"]
