"""Train any network in less memory: what can be computed again is not kept for the backward pass."""

from .batchnorm import NormAct, to_batchnorm
from .convert import convert, restore
from .report import Bytes, Layer, Report

__all__ = ["Bytes", "Layer", "NormAct", "Report", "convert", "restore", "to_batchnorm"]
