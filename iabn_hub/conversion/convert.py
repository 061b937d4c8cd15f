"""`convert`: let a network keep less for its backward pass, without a change of what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .recompute import Recording

_STATE = "_iabn_hub_recomputation"


class _Recomputation:
    """The hooks of a converted network; they survive copying and pickling."""

    def __init__(self) -> None:
        self.recordings: list[Recording | None] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        recording = None if _steps_aside() else Recording()
        self.recordings.append(recording)
        if recording is not None:
            recording.__enter__()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        recording = self.recordings.pop() if self.recordings else None
        if recording is not None:
            recording.__exit__(None, None, None)

    def __deepcopy__(self, memo: Any) -> _Recomputation:
        return _Recomputation()

    def __getstate__(self) -> dict[str, Any]:
        return {"recordings": []}


def _steps_aside() -> bool:
    return (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
    )


def convert(model: nn.Module) -> nn.Module:
    if not hasattr(model, _STATE):
        state = _Recomputation()
        before = model.register_forward_pre_hook(state.enter)
        after = model.register_forward_hook(state.leave, always_call=True)
        setattr(model, _STATE, (before, after))
    return model


def restore(model: nn.Module) -> nn.Module:
    for handle in model.__dict__.pop(_STATE, ()):
        handle.remove()
    return model
