"""Compare the operators of a device with the reference kernels."""

from __future__ import annotations

from typing import Any

import torch

from . import ops, reference
from .activations import LEAKY_RELU

TOLERANCE = 1e-4  # relative to the largest value, float32


def compare(device: str) -> dict[str, float]:
    """Largest relative error of each operator against the reference on random float32 input, in both layouts."""
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for form in (torch.contiguous_format, torch.channels_last):
        x, residual, dy = (random(3, 40, 9, 7).contiguous(memory_format=form) for _ in range(3))
        arguments = (random(40), random(40), residual, 1e-5, LEAKY_RELU, 0.01, True)
        mean, var = reference.statistics(x)
        y = reference.normalize(x, mean, var, *arguments)
        calls: dict[str, tuple[Any, ...]] = {
            "statistics": (x,),
            "normalize": (x, mean, var, *arguments),
            "batch_normalize": (x, *arguments),
            "gradient_sums": (y, dy, *arguments),
            "input_gradient": (y, dy, var, mean, mean, True, *arguments),
            "batch_gradient": (y, dy, var, True, *arguments),
        }
        for operator, given in calls.items():
            ours, theirs = getattr(ops, operator)(*given), getattr(reference, operator)(*given)
            for a, b in zip(_tuple(ours), _tuple(theirs)):
                error = float((a - b).abs().max() / b.abs().max())
                errors[operator] = max(errors.get(operator, 0.0), error if error == error else float("inf"))
    return errors


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)
