"""iabn-hub doctor: which kernels the layer uses here and why, and whether they compute what they should."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import click
import timm
import torch

from .. import __version__
from ..layers.backends import building, loading
from ..layers.self_check import TOLERANCE, compare
from ..signing import SignatureError, publishers, publishers_file
from .frame import FAILED, OK, json_option, print_json

# What a device without native kernels costs.
COSTS = {
    "native": None,
    "inductor": "operators compile for seconds in each process, and read tensors more often",
    "reference": "the layer is several times slower",
}


@click.command("doctor")
@json_option
def command(as_json: bool) -> int:
    """Show which kernels the layer uses here, and check them.

    Shows why they are used, and compares them with the reference kernels. Builds the kernels if necessary.
    """
    facts = examine()
    if as_json:
        print_json(facts)
    else:
        print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
        for key in (
            "machine",
            "threads",
            "instruction_sets",
            "compiler",
            "ninja",
            "cuda_toolkit",
            "cache_folder",
            "publishers",
        ):
            value = facts[key]
            print(f"  {key:<17} {', '.join(value) if isinstance(value, list) else value}")
        for name, device in facts["devices"].items():
            print(f"{name}: {device['backend']} kernels, {device['reason']}")
            for key in ("library", "cost", "self_check"):
                if device[key]:
                    print(f"  {key:<17} {device[key]}")
    return OK if facts["healthy"] else FAILED


def examine() -> dict[str, Any]:
    """The facts as plain values, ready for JSON."""
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
        "instruction_sets": _or_error(lambda: list(building.levels_here())),
        "compiler": _or_error(lambda: str(building.compiler())),
        "ninja": _or_error(lambda: str(building.ninja())),
        "cuda_toolkit": _or_error(lambda: str(building.cuda_home())),
        "cache_folder": str(loading.cache_folder()),
        "publishers": _publishers(),
        "devices": devices,
        "healthy": all(device["healthy"] for device in devices.values()),
    }


def _publishers() -> list[str]:
    """Whose published kernels are taken, with the keys of their signatures."""
    try:
        listed = [f"{name} (key {each.key}, from release {each.minimum})" for name, each in publishers().items()]
        return listed or [f"none in {publishers_file()}"]
    except SignatureError as e:
        return [str(e)]


def _or_error(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except building.BuildError as e:
        return f"none: {e}"


def _device(name: str) -> dict[str, Any]:
    try:
        status = loading.use_native(name)
    except building.BuildError as e:
        unknown = {"backend": "none", "reason": str(e), "library": None, "cost": None}
        return {**unknown, "healthy": False, "self_check": "not run"}
    errors = compare(name)
    healthy = max(errors.values()) <= TOLERANCE
    worst = max(errors, key=lambda operator: errors[operator])
    return {
        "backend": status.backend,
        "reason": status.reason,
        "library": status.library,
        "cost": COSTS[status.backend],
        "healthy": healthy,
        "self_check": f"{'correct' if healthy else 'WRONG'}: largest error {errors[worst]:.1e}, in {worst}",
    }
