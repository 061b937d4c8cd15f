"""iabn-hub benchmark: speed of the layer, and memory of networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ..benchmarks.layer import LayerOptions, measure_layer
from ..benchmarks.memory import NETWORKS, measure_memory
from ..benchmarks.plots import draw, require_matplotlib
from ..benchmarks.step import BASELINE, DTYPES, WAYS, StepOptions, add_largest_batches, measure_steps, summarised
from ..benchmarks.step import NETWORKS as STEP_NETWORKS
from ..benchmarks.training import TrainingOptions, measure_training
from ..models import MODELS
from ..models.libraries import create_from_library
from ..world import init_world, usable_device
from .frame import device_option, json_option, options, print_json, workers_option

common: Callable[[Any], Any] = options(
    device_option,
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: torch's own choice)."),
    click.option("--no-compile", is_flag=True, help="Leave the compiled contenders out."),
    json_option,
)


@click.group("benchmark")
def command() -> None:
    """Measure speed and memory of the layer and the networks.

    Each benchmark runs all contenders in one run and prints their ratios.
    """


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


@command.command("step")
@click.argument("networks", metavar="[NAME]…", nargs=-1)
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--size", type=click.IntRange(min=1), help="Sides of the images; default: the network's own.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of autocast.")
@click.option("--nchw", is_flag=True, help="Images and weights as NCHW, in place of channels_last.")
@click.option("--way", "ways", metavar="WAY", multiple=True, help=f"Only this, and {BASELINE}; repeat it for several.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--fit", metavar="BYTES", type=click.FloatRange(min=1e6), help="Also find the largest batch that fits.")
@click.option(
    "--plot", metavar="FOLDER", type=click.Path(file_okay=False, path_type=Path), help="Draw NAME.svg and .png."
)
@common
def step(networks: tuple[str, ...], nchw: bool, ways: tuple[str, ...], **given: Any) -> None:
    """Memory and time of a training step: standard, in place, converted, checkpointed, compiled.

    NAME is a network of 'iabn-hub list', or of another library as for 'iabn-hub memory'. All ways run in one
    process, in turn. "step" is the time of a forward and a backward pass relative to the standard network; "kept" and
    "peak" are bytes of the allocator, relative to it.

    \b
    Examples:
      iabn-hub benchmark step resnet50_iabn --no-compile
      iabn-hub benchmark step efficientnet_b0 --way converted --fit 2e9
      iabn-hub benchmark step --json > step.json        the table of the documentation, an hour on 2 cores
    """
    device, report = _prepare(given)
    unknown = set(ways) - {way.name for way in WAYS}
    if unknown:
        known = ", ".join(repr(way.name) for way in WAYS)
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: choose one of {known}", param_hint="'--way'")
    options = StepOptions(
        given["batch_size"], given["size"], device, given["dtype"], not nchw, not given["no_compile"],
        rounds=given["rounds"], ways=ways,
    )  # fmt: skip
    names = networks or STEP_NETWORKS
    for name in set(names) - set(MODELS):
        create_from_library(name)  # known now, not after an hour
    if given["plot"]:
        require_matplotlib()
        given["plot"].mkdir(parents=True, exist_ok=True)
    result = measure_steps(names, options, report)
    if given["fit"]:
        add_largest_batches(result, int(given["fit"]), options, report)
    if given["as_json"]:
        print_json(summarised(result))
    if given["plot"]:
        for path in draw(result, given["plot"]):
            report(f"wrote {path}")


@command.command("training")
@click.argument("recipe", metavar="RECIPE")
@click.argument("data", metavar="DATA")
@click.option("--set", "changes", metavar="KEY=VALUE", multiple=True, help="Change the recipe.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Per round.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--cache-images", is_flag=True, help="Decode each image once, as 'iabn-hub train --cache-images' does.")
@workers_option
@device_option
@json_option
def training(recipe: str, data: str, changes: tuple[str, ...], as_json: bool, cache_images: bool, **given: Any) -> None:
    """Time the training loop beside a bare loop on one batch in memory; DATA is a folder as for 'iabn-hub train'."""
    chosen = TrainingOptions(recipe, data, changes, given["workers"], cache_images, given["steps"], given["rounds"])
    with init_world(given["device"]) as world:
        result = measure_training(chosen, world)
    if as_json:
        print_json(result)
        return
    print(f"{result['machine']}, {chosen.workers} workers")
    print(
        f"{result['network']} at {result['crop']}, batch {result['batch']}, {result['steps']} steps × {chosen.rounds}: "
        f"training loop {result['loop_images_per_second']:.1f}, bare loop {result['bare_images_per_second']:.1f} "
        f"images/s, {100 * result['loop_to_bare']:.1f} % of the bare loop; {100 * result['waiting']:.1f} % of the time "
        "waiting for data"
    )


def _prepare(given: dict[str, Any]) -> tuple[str, Callable[[str], None]]:
    if given["threads"]:
        torch.set_num_threads(given["threads"])

    def report(text: str) -> None:
        if not given["as_json"]:
            print(text, flush=True)

    return usable_device(given["device"]).type, report
