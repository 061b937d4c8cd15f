"""iabn-hub memory: what a network keeps for its backward pass, and what it would keep after `convert`."""

from __future__ import annotations

import difflib
from typing import Any

import click
import timm
import torch
from torch import nn

from ..checkpoints.errors import UnknownNameError
from ..conversion import convert
from ..conversion.recording import METHODS
from ..world import usable_device
from .frame import device_option, json_option, print_json

TORCHVISION = "torchvision."
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
@click.option("--size", type=click.IntRange(1), help="Height and width of the images; default: the network's own.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True, help="As in iabn_hub.convert.")
@click.option("--all", "show_all", is_flag=True, help="Also list the layers that keep less than 1 %.")
@device_option
@json_option
def command(
    model: str, batch_size: int, size: int | None, method: str, show_all: bool, device: str | None, as_json: bool
) -> None:
    """Show what a network keeps for the backward pass, and what it would keep after iabn_hub.convert.

    MODEL is a name of timm, such as efficientnet_b0, or of torchvision: torchvision.resnet50. It is randomly
    initialised, nothing is downloaded. Measures training steps on random images in float32: bytes kept by each layer,
    and the peak of a step beyond parameters and gradients, in MB (10^6 bytes).

    \b
    Examples:
      iabn-hub memory torchvision.resnet50
      iabn-hub memory efficientnet_b0 --batch-size 32 --size 288 --json
    """
    network, usual = create(model)
    where = usable_device(device)
    channels, side = usual[0], size or usual[-1]
    sample = torch.randn(batch_size, channels, side, side, device=where)
    try:
        report = convert(network.to(where).train(), sample, method=method)
    except (RuntimeError, TypeError, IndexError, AttributeError) as e:
        raise ValueError(
            f"{model}: a training step on images of {tuple(sample.shape)} fails: {(str(e).splitlines() or [''])[0]}"
        ) from e
    if as_json:
        facts = {"model": model, "batch_size": batch_size, "size": side, "device": str(where), "dtype": "float32"}
        print_json(facts | report.to_json())
    else:
        print(f"{model}, batch {batch_size} at {side}×{side}, float32, MB")
        print("\n".join(report.table(0 if show_all else SMALLEST)))


def create(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network of that name, randomly initialised, and the size (channels, height, width) of its images.

    Raises:
        UnknownNameError: neither timm nor torchvision has it; suggests what is spelt alike.
    """
    if name.startswith(TORCHVISION):
        try:
            import torchvision  # noqa: PLC0415 - an extra
        except ImportError as e:
            raise click.UsageError(f"{name} needs torchvision: pip install 'iabn-hub[train]'") from e
        names = torchvision.models.list_models(module=torchvision.models)
        short = name.removeprefix(TORCHVISION)
        if short not in names:
            raise _unknown(name, [TORCHVISION + each for each in names])
        extra = {"aux_logits": False, "init_weights": True} if short in ("googlenet", "inception_v3") else {}
        side = 299 if short == "inception_v3" else 224
        return torchvision.models.get_model(short, weights=None, **extra), (3, side, side)
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models())
    model = timm.create_model(name)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return model, config.get("input_size", (3, 224, 224))


def _unknown(name: str, names: list[str]) -> UnknownNameError:
    near = difflib.get_close_matches(name, names, 3)
    hint = f"; did you mean {', '.join(near)}?" if near else "; names of torchvision begin with 'torchvision.'"
    return UnknownNameError(f"no network is called {name!r}{hint}")
