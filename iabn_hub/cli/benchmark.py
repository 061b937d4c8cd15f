"""iabn-hub benchmark: speed of the layer, and memory of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch

from ..benchmarks.layer import LayerOptions, measure_layer
from ..benchmarks.memory import NETWORKS, measure_memory
from ..world import usable_device
from .frame import device_option, json_option, options, print_json

common: Callable[[Any], Any] = options(
    device_option,
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: torch's own choice)."),
    click.option("--no-compile", is_flag=True, help="Leave the compiled contenders out."),
    json_option,
)


@click.group("benchmark")
def command() -> None:
    """Measure the layer and the networks beside what they compete with, in one run."""


@command.command("layer")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--warmup", type=click.IntRange(min=0), default=3, show_default=True)
@click.option("--scale", type=click.IntRange(min=1), help="Multiply the batch by this (default: 1; on CUDA 16).")
@click.option("--shapes", type=click.Choice(["usual", "resnet50"]), default="usual", help="resnet50: at batch 32.")
@common
def layer(rounds: int, warmup: int, scale: int | None, shapes: str, **given: Any) -> None:
    """Time forward and backward of the layer: ratios, and the share of a copy's bandwidth."""
    device, report = _prepare(given)
    chosen = LayerOptions(device, not given["no_compile"], rounds, warmup, shapes, scale)
    result = measure_layer(chosen, report)
    if given["as_json"]:
        print_json(result)


@command.command("memory")
@click.argument("networks", metavar="[NAME]…", nargs=-1)
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@common
def memory(networks: tuple[str, ...], batch_size: int, **given: Any) -> None:
    """Count the bytes that networks keep for the backward pass, at 224 × 224 in float32."""
    device, report = _prepare(given)
    result = measure_memory(networks or NETWORKS, batch_size, device, not given["no_compile"], report)
    if given["as_json"]:
        print_json(result)


def _prepare(given: dict[str, Any]) -> tuple[str, Callable[[str], None]]:
    if given["threads"]:
        torch.set_num_threads(given["threads"])

    def report(text: str) -> None:
        if not given["as_json"]:
            print(text, flush=True)

    return usable_device(given["device"]).type, report
