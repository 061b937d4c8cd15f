"""The command line: one module for each command of `iabn-hub`, in one frame."""

from .frame import main

__all__ = ["main"]
