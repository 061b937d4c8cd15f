"""Train any network in less memory: what can be computed again is not kept for the backward pass."""

from .convert import convert, restore

__all__ = ["convert", "restore"]
