"""In-place activated batch normalisation: modules, functions, and the operators under them."""

from .functional import inplace_abn, inplace_abn_sync
from .modules import ABN, InPlaceABN, InPlaceABNSync

__all__ = ["ABN", "InPlaceABN", "InPlaceABNSync", "inplace_abn", "inplace_abn_sync"]
