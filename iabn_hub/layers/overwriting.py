"""When in-place ABN writes a new tensor although it may overwrite its input: where overwriting would do harm."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)


def may_overwrite(x: Tensor, residual: Tensor | None) -> bool:
    """Whether nothing forbids to overwrite x. What does is logged, once."""
    obstacle = _obstacle(x, residual)
    if obstacle:
        _hint(obstacle)
    return not obstacle


def _obstacle(x: Tensor, residual: Tensor | None) -> str:
    autograd: Any = torch._C._autograd
    recording = torch.is_grad_enabled()
    base = x if x._base is None else x._base
    if base.is_leaf and base.requires_grad:
        return "is a leaf that requires a gradient"
    if recording and x._is_view() and autograd._get_creation_meta(x) != autograd.CreationMeta.DEFAULT:
        return "is a view that autograd protects (from chunk, split or unbind, or behind a full backward hook)"
    if x.requires_grad and not recording:
        return "belongs to a graph, outside of which the layer runs (torch.no_grad, a reentrant checkpoint)"
    if recording and autograd._top_saved_tensors_default_hooks(True) is not None:
        return "may be needed again (activation checkpointing, or other hooks on saved tensors)"
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode, outside of which the layer runs"
    if torch._debug_has_internal_overlap(x) == 1:
        return "has elements that share memory (from expand)"
    if residual is not None and _starts_where(residual, x):
        return "is the residual as well"
    return ""


@functools.cache
def _hint(obstacle: str) -> None:
    _logger.info(
        "an input of in-place ABN %s: the layer writes a new tensor instead of overwriting it, and saves no more for "
        "the backward pass",
        obstacle,
    )


def _starts_where(a: Tensor, b: Tensor) -> bool:
    shared: bool = a is b or torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]
    return shared and int(a.storage_offset()) == int(b.storage_offset())
