"""Where `use_native` was before; `backends.loading` has it now."""

from .backends.loading import use_native

__all__ = ["use_native"]
