"""What this machine offers the layer: compiler, which kernels each device uses and why, and whether they are right."""

from __future__ import annotations

import platform
from typing import Any

import timm
import torch

from . import __version__
from .layers import building, extension, ops, reference
from .layers.activations import LEAKY_RELU

# What a device without native kernels costs its user.
LOSSES = {
    "native": None,
    "inductor": "operators compile for seconds in each process, and read tensors more often",
    "reference": "the layer is several times slower",
}
TOLERANCE = 1e-4  # relative to the largest value, float32


def examine() -> dict[str, Any]:
    """The facts as plain values, ready for JSON. Builds the kernels if that has not happened yet."""
    devices: dict[str, Any] = {"cpu": _device("cpu")}
    if torch.cuda.is_available():
        devices["cuda"] = {"name": torch.cuda.get_device_name(), **_device("cuda")}
    return {
        "versions": {
            "iabn_hub": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction_sets": list(building.levels_here()),
        "compiler": _or_error(building.compiler),
        "ninja": _or_error(building.ninja),
        "cuda_toolkit": _or_error(building.cuda_home),
        "cache_folder": str(extension.cache_folder()),
        "devices": devices,
        "healthy": all(device["healthy"] for device in devices.values()),
    }


def _or_error(find: Any) -> str:
    try:
        return str(find())
    except building.BuildError as e:
        return f"none: {e}"


def _device(name: str) -> dict[str, Any]:
    try:
        status = extension.use_native(name)
    except building.BuildError as e:
        return {
            "backend": "none",
            "reason": str(e),
            "library": None,
            "loss": None,
            "healthy": False,
            "self_check": "not run",
        }
    errors = compare(name)
    healthy = max(errors.values()) <= TOLERANCE
    worst = max(errors, key=lambda operator: errors[operator])
    return {
        "backend": status.backend,
        "reason": status.reason,
        "library": status.library,
        "loss": LOSSES[status.backend],
        "healthy": healthy,
        "self_check": f"{'right' if healthy else 'WRONG'}: largest error {errors[worst]:.1e}, in {worst}",
    }


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
