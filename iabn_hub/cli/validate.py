"""iabn-hub validate: metrics of a network over a held-out split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..classification.validation import ClassificationProtocol
from ..datasets.folders import Location
from ..datasets.segmentation import IGNORE_INDEX
from ..evaluation import Runtime
from ..models.pretrained import Pretrained
from ..segmentation.validation import SegmentationProtocol
from ..training.validation import ValidateOptions, ValidationProtocol, validate
from ..versions import versions
from ..world import init_world
from .frame import (
    FAILED,
    OK,
    amp_option,
    command_line,
    complete_names,
    device_option,
    json_option,
    options,
    print_json,
    usage_errors,
    workers_option,
)
from .segment import view_options, views_of

SEGMENTATION_ONLY = ("scales", "flip", "fusion", "long_side", "tile", "ignore_index")
CLASSIFICATION_ONLY = ("crop", "resize", "ten_crop", "dataset", "samples", "download")
NETWORK = ("norm_layer", "activation", "activation_param")

segmentation_options = options(
    view_options,
    click.option("--ignore-index", type=click.IntRange(0, IGNORE_INDEX), metavar="N",
                 help=f"Value in the label files that is not scored, besides {IGNORE_INDEX}."),
)  # fmt: skip
classification_options = options(
    click.option("--crop", type=click.IntRange(min=16), metavar="PIXELS",
                 help="Side of the crop (default: the network's)."),
    click.option("--resize", type=int, metavar="PIXELS",
                 help="Shorter side before the crop (default: in proportion; −1 does not resize)."),
    click.option("--ten-crop", is_flag=True, help="Centre and corners, also flipped: the mean of their logits."),
    click.option("--dataset", default="", help="timm's name of a dataset: wds, hfds/NAME, hfids/NAME, torch/cifar10 …"),
    click.option("--samples", type=int, metavar="N", help="Images of a stream that does not state its number."),
    click.option("--download", is_flag=True, help="Let the dataset's package download it."),
)  # fmt: skip
network_options = options(
    click.option("--arch", metavar="NAME", help="The architecture, for a file that does not state it."),
    click.option("--norm-layer", type=click.Choice(["iabn", "abn"]), help="In-place, or standard BatchNorm."),
    click.option("--activation", type=click.Choice(["relu", "leaky_relu", "elu", "identity"])),
    click.option("--activation-param", type=float, metavar="X", help="Slope of leaky_relu, alpha of elu."),
)


@click.command("validate")
@click.argument("model", metavar="MODEL", shell_complete=complete_names)
@click.argument("data", metavar="[DATA]", default="")
@click.option("--split", default="val", show_default=True, help="Its name, or shards.")
@click.option(
    "--check",
    is_flag=True,
    help="Compare with the published figures of this protocol, or with those of a run's metrics.json.",
)
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.1, show_default=True, metavar="POINTS")
@classification_options
@segmentation_options
@network_options
@device_option
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images at once, per rank."
)
@amp_option
@click.option("--channels-last", is_flag=True, help="Use the channels_last memory format.")
@workers_option
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE",
              help="Also write an HTML page with the worst classes and the most confident errors.")  # fmt: skip
@json_option
def command(model: str, data: str, **given: Any) -> int:
    """Measure a network on a held-out split.

    Every image counts once, on one device or, under torchrun, on many.

    Classification: top-1, top-5 and loss. Segmentation: intersection over union of each class, and their mean (mIoU).

    MODEL is a name from 'iabn-hub list', hf-hub:ORG/NAME, the folder of a run, a snapshot (best.pt), or a file of
    weights (with --arch if it does not state its architecture). DATA is a folder with val/CLASS/*, or what --dataset
    names; for segmentation see 'iabn-hub train --help'.

    \b
    Examples:
      iabn-hub validate test_resnet_iabn.mnist data/mnist --check
      iabn-hub validate resnext101_iabn /data/imagenet --ten-crop --check
      iabn-hub validate runs/digits data/mnist --report digits.html --check
      iabn-hub validate wider_resnet38_deeplab3_iabn.vistas /data/vistas --flip
      iabn-hub validate resnet50.pth /data/imagenet --arch resnet50_iabn --norm-layer abn --activation relu
    """
    if not data and not given["dataset"]:
        raise click.UsageError("name the folder of the images: MODEL DATA")
    location = Location(
        data, given["dataset"], val_split=given["split"], val_samples=given["samples"], download=given["download"]
    )
    chosen = ValidateOptions(
        model, location, given["arch"], {name: given[name] for name in NETWORK if given[name] is not None},
        given["check"], given["tolerance"], given["batch_size"], given["workers"],
        Runtime(given["amp"], given["channels_last"]), given["report"],
    )  # fmt: skip
    with init_world(given["device"]) as world:
        facts, lines = validate(chosen, lambda network: _protocol(network, given), world)
        facts |= {"command": command_line(), "versions": versions()}
        if world.is_primary:
            print_json(facts) if given["as_json"] else print("\n".join(lines))
    return OK if facts.get("check", {}).get("passed", True) else FAILED


def _protocol(network: Pretrained, given: dict[str, Any]) -> ValidationProtocol:
    context = click.get_current_context()
    segmentation = network.task == "segmentation"
    for name in CLASSIFICATION_ONLY if segmentation else SEGMENTATION_ONLY:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            other = "classification" if segmentation else "segmentation"
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is for {other}, {network.name} is for {network.task}", context)
    with usage_errors():
        if segmentation:
            return SegmentationProtocol(network, views_of(given), given["long_side"], given["ignore_index"])
        return ClassificationProtocol(network, given["crop"], given["resize"], given["ten_crop"])
