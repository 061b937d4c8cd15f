"""iabn-hub memory: what a network keeps for its backward pass, and what it would keep after `convert`."""

from __future__ import annotations

import dataclasses

import click

from ..conversion.explain import explanation
from ..conversion.recording import METHODS
from ..models.libraries import create_from_library, explain_memory, images_of, measure_conversion
from ..world import usable_device
from .frame import device_option, json_option, print_json

SMALLEST = 0.01  # share of the bytes that a layer must keep to be listed


@click.command("memory")
@click.argument("model", metavar="MODEL")
@click.option(
    "--batch-size",
    "--batch",
    "batch_size",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Images in the batch.",
)
@click.option("--size", type=click.IntRange(1), help="Sides of the images; default: the network's own.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True, help="As in iabn_hub.convert.")
@click.option("--all", "show_all", is_flag=True, help="Also list the layers that keep less than 1 %.")
@click.option(
    "--explain", is_flag=True, help="List every tensor that the network keeps as it is, and which operators keep it."
)
@device_option
@json_option
def command(
    model: str,
    batch_size: int,
    size: int | None,
    method: str,
    show_all: bool,
    explain: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Show what a network keeps for the backward pass, and what it would keep after iabn_hub.convert.

    MODEL is a name of timm, such as efficientnet_b0, or of another library: torchvision.resnet50, smp.Unet,
    nnunet.ResidualEncoderUNet, monai.DynUNet. It is randomly initialised, nothing is downloaded. Measures training
    steps on random images in float32: bytes kept by each layer, and the peak of a step beyond parameters and gradients,
    in MB (10^6 bytes).

    \b
    Examples:
      iabn-hub memory torchvision.resnet50
      iabn-hub memory resnet50_iabn --explain
      iabn-hub memory efficientnet_b0 --batch-size 32 --size 288 --json
    """
    network, usual = create_from_library(model)
    where = usable_device(device)
    shape = images_of(usual, batch_size, size)
    facts = {"model": model, "batch_size": batch_size, "size": shape[-1], "device": str(where), "dtype": "float32"}
    heading = f"{model}, batch {batch_size} at {'×'.join(map(str, shape[2:]))}, float32, MB"
    if explain:
        tensors = explain_memory(model, network.to(where), shape)
        if as_json:
            print_json(facts | {"tensors": [dataclasses.asdict(t) for t in tensors]})
        else:
            print(heading)
            print("\n".join(explanation(tensors, 0 if show_all else SMALLEST)))
        return
    report = measure_conversion(model, network.to(where), shape, method)
    if as_json:
        print_json(facts | report.to_json())
    else:
        print(heading)
        print("\n".join(report.table(0 if show_all else SMALLEST)))
