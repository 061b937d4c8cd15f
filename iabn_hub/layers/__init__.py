"""In-place activated normalisation: modules, functions, and the operators under them."""

from .backends.loading import use_backend
from .distributed import active_group, set_active_group
from .functional import inplace_abn, inplace_abn_sync
from .group_norm import InPlaceGroupNorm, InPlaceInstanceNorm, inplace_group_norm
from .modules import ABN, InPlaceABN, InPlaceABNSync
from .synchronisation import convert_local, convert_sync

__all__ = [
    "ABN",
    "InPlaceABN",
    "InPlaceABNSync",
    "InPlaceGroupNorm",
    "InPlaceInstanceNorm",
    "active_group",
    "convert_local",
    "convert_sync",
    "inplace_abn",
    "inplace_abn_sync",
    "inplace_group_norm",
    "set_active_group",
    "use_backend",
]
