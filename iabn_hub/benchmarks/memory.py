"""Bytes that networks keep for the backward pass, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..models import create_model
from .machine import describe_machine

NETWORKS = ("resnet50_iabn", "resnext101_iabn", "densenet121_iabn", "wider_resnet38_iabn")
BUDGETS = (1.0, 0.99, 0.5)


def measure_memory(
    networks: Sequence[str], batch_size: int, device: str, with_compile: bool, report: Callable[[str], None]
) -> dict[str, Any]:
    """Bytes by network and way, ready for JSON; `report` is called with the text of each."""
    # channels_last throughout: else Inductor keeps copies of the convolutions' weights in that layout.
    form: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}
    x = torch.randn(batch_size, 3, 224, 224).to(**form)
    results: dict[str, dict[str, int]] = {}
    for name in networks:
        rows: dict[str, int] = {}
        for way, (norm_layer, budget) in _ways(with_compile).items():
            torch.compiler.reset()
            network = create_model(name, norm_layer=norm_layer).to(**form).train()
            torch._functorch.config.activation_memory_budget = 1.0 if budget is None else budget
            rows[way] = kept_bytes(network, network if budget is None else torch.compile(network), x)
            saved = 100 * (1 - rows[way] / rows["standard"])
            report(f"{name:<22} {way:<28} {rows[way] / 1e6:8.1f} MB  {saved:5.1f} % saved")
        results[name] = rows
    return {"machine": describe_machine(device), "batch_size": batch_size, "bytes": results}


def _ways(with_compile: bool) -> dict[str, tuple[str, float | None]]:
    """By name: the kind of norm, and the compiler's activation memory budget; None is eager mode."""
    ways: dict[str, tuple[str, float | None]] = {"standard": ("abn", None), "in place": ("iabn", None)}
    if with_compile:
        ways |= {f"standard, compiled at {budget}": ("abn", budget) for budget in BUDGETS}
        ways["in place, compiled"] = ("iabn", 1.0)
    return ways


def kept_bytes(network: nn.Module, step: Callable[..., Any], x: torch.Tensor) -> int:
    """Bytes of distinct storages, without parameters, that a training step keeps; on CUDA the peak of allocation."""
    if x.is_cuda:
        step(x).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x).sum().backward()
        return torch.cuda.max_memory_allocated() - before
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    found: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    step(x)  # compiled code is made now, without hooks
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        step(x)
    return sum(found.values())
