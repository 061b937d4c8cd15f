"""iabn-hub train: train a network by a recipe, or fine-tune one."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..checkpoints.catalogue import checkpoints_of
from ..datasets.folders import Location
from ..models.factory import CONVERTED_MODELS
from ..recipes import Recipe, RecipeError, find_recipe, read_recipe, recipe_names
from ..training.run import Options, train
from ..world import init_world
from .frame import (
    INTERRUPTED,
    OK,
    command_line,
    complain,
    device_option,
    json_option,
    options,
    print_json,
    workers_option,
)

# Options that stand for keys of the recipe.
SHORTHANDS = {
    "epochs": "optimizer.schedule.epochs",
    "batch_size": "optimizer.batch_size",
    "accumulation_steps": "training.accumulation_steps",
    "amp": "training.amp",
    "channels_last": "training.channels_last",
    "compile": "training.compile",
    "seed": "training.seed",
}
start_options = options(
    click.option("--out", type=click.Path(path_type=Path), help="Folder of the run (default: runs/RECIPE)."),
    click.option("--resume", metavar="auto|FILE", help="Continue from the newest snapshot in --out, or from this one."),
    click.option("--overwrite", is_flag=True, help="Delete the snapshots of an earlier run in --out."),
    click.option("--pretrained", is_flag=False, flag_value="", metavar="[MODEL]",
                 help="Start from the published weights, or from these: a file, a run, a snapshot, hf-hub:ORG/NAME."),
)  # fmt: skip
recipe_options = options(
    click.option("--set", "changes", metavar="KEY=VALUE", multiple=True,
                 help="Change the recipe: optimizer.learning_rate=0.05"),
    click.option("--model", metavar="NAME", help="Another network: resnet50_iabn, resnext101_abn …"),
    click.option("--epochs", type=int, help="Epochs of the schedule."),
    click.option("--batch-size", type=int, help="Images per optimizer step, over all ranks and accumulation steps."),
    click.option("--accumulation-steps", type=int, help="Forward and backward passes per optimizer step."),
    click.option("--amp", type=click.Choice(["off", "bf16", "fp16"]), help="Mixed precision."),
    click.option("--channels-last", is_flag=True, default=None, help="Use the channels_last memory format."),
    click.option("--compile", is_flag=True, default=None, help="Use torch.compile."),
    click.option("--seed", type=int, help="Of initialisation, order and augmentation."),
)  # fmt: skip
run_options = options(
    device_option,
    workers_option,
    click.option("--cache-images", is_flag=True,
                 help="Decode each image once, into a temporary file (in TMPDIR; per rank)."),
    click.option("--keep", type=click.IntRange(min=1), default=2, show_default=True,
                 help="Snapshots to keep, besides the best."),
    click.option("--snapshot-minutes", type=click.FloatRange(min=0), default=30, show_default=True,
                 help="Minutes between snapshots within an epoch."),
    click.option("--max-broken", type=click.IntRange(min=0), metavar="N",
                 help="Unreadable images to tolerate (default: 1 % of the training images, at least 10)."),
    click.option("--best", is_flag=True, help="Write the best epoch as model.safetensors, instead of the last."),
)  # fmt: skip
dataset_options = options(
    click.option("--dataset", default="", help="timm's name of a dataset: wds, hfds/NAME, hfids/NAME, torch/cifar10 …"),
    click.option("--train-split", default="train", show_default=True,
                 help="Its name, or shards: 'train-{0000..0099}.tar'."),
    click.option("--val-split", default="val", show_default=True),
    click.option("--train-samples", type=int, metavar="N", help="Images of a stream that does not state its number."),
    click.option("--val-samples", type=int, metavar="N"),
    click.option("--download", is_flag=True, help="Let the dataset's package download it."),
)  # fmt: skip


@click.command("train")
@click.argument("recipe", metavar="RECIPE")
@click.argument("data", metavar="[DATA]", default="")
@start_options
@recipe_options
@run_options
@dataset_options
@json_option
def command(recipe: str, data: str, **given: Any) -> int:
    """Train or fine-tune a network by a recipe.

    Runs on one device, and on many under torchrun.

    RECIPE is a JSON file or the name of a bundled recipe; 'iabn-hub train list' shows the names.

    DATA, for classification, is a folder with CLASS/*, of which every fifth image is for validation; or with
    train/CLASS/* and val/CLASS/*, or train.tar and val.tar. With --dataset
    it is what timm reads under that name: shards (wds), Hugging Face datasets (hfds/NAME, streamed: hfids/NAME),
    torchvision's (torch/cifar10). For segmentation it is a folder with train/images/* and train/labels/*.png of the
    same names, and val likewise: a label file holds the class of each pixel, classes.json the list of their names. Or
    it is the folder of Mapillary Vistas (training/, validation/) or Cityscapes (leftImg8bit/, gtFine/).

    --out receives snapshots/ (the best as best.pt), recipe.json (with all changes), train.log, metrics.csv,
    tensorboard/, and at the end model.safetensors (the last epoch), best.safetensors, config.json, metrics.json and
    report.html.

    A run that was stopped or killed continues with the same command and --resume auto, and ends with the same weights.
    With --resume auto from the start, one command serves every start: --pretrained counts where there is no snapshot.
    Ctrl-C and SIGTERM save a snapshot first. Two processes cannot train into the same folder.

    \b
    Examples:
      iabn-hub train finetune photos --out runs/photos
      iabn-hub train test_resnet_iabn.mnist data/mnist --out runs/digits
      iabn-hub train resnet50_iabn.modern data/birds --pretrained --epochs 20 --set optimizer.learning_rate=0.02
      iabn-hub train test_resnet_deeplab3_iabn.shapes data/shapes --out runs/shapes
      torchrun --standalone --nproc-per-node 8 -m iabn_hub train resnet50_iabn.sync_lr_512_in1k /data/imagenet
    """
    if recipe == "list":
        names = recipe_names()
        print_json(names) if given["as_json"] else print("\n".join(names))
        return OK
    if not data and not given["dataset"]:
        raise click.UsageError("name the folder of the images: RECIPE DATA")
    if given["resume"] and given["overwrite"]:
        raise click.UsageError("--resume continues a run: leave --overwrite out")
    if given["resume"] not in (None, "auto") and given["pretrained"] is not None:
        raise click.UsageError("a snapshot holds its own weights: leave --pretrained out, or pass --resume auto")
    path = find_recipe(recipe)
    chosen = _with_changes(path, given)
    run = _options(data, given, given["out"] or Path("runs") / path.stem)
    # With --json, stdout holds the results alone.
    stdout = contextlib.redirect_stdout(sys.stderr) if given["as_json"] else contextlib.nullcontext()
    try:
        with stdout, init_world(given["device"]) as world, _signals() as signals:
            finished = train(chosen, run, world, signals.__bool__)
    except KeyboardInterrupt:
        return complain("interrupted; the snapshots are complete, continue with --resume auto", INTERRUPTED)
    if not finished:
        return 128 + (signals.received or signal.SIGTERM)
    if given["as_json"] and world.is_primary:
        print((run.out / "metrics.json").read_text(), end="")
    return OK


def _with_changes(path: Path, given: dict[str, Any]) -> Recipe:
    changes = list(given["changes"])
    if given["model"]:
        arch, _, kind = given["model"].rpartition("_")
        if kind not in ("iabn", "abn"):
            raise RecipeError(f"--model is {given['model']!r}, not a name such as resnet50_iabn")
        changes = [*_network_changes(given["model"], arch, kind, read_recipe(path)), *changes]
    changes += [f"{key}={json.dumps(given[name])}" for name, key in SHORTHANDS.items() if given[name] is not None]
    return read_recipe(path, changes)


def _network_changes(name: str, arch: str, kind: str, recipe: Recipe) -> list[str]:
    """What --model changes in a recipe, so that it makes the network of this name."""
    changes = [f"network.arch={arch}"]
    if f"{arch}_iabn" in CONVERTED_MODELS:
        if kind == "abn":
            raise RecipeError(f"--model is {name!r}: there is only {arch}_iabn, which has converted norms")
        changes += ["network.bn_mode=standard", "network.activation=relu"]
    elif kind == "abn":
        changes.append("network.bn_mode=standard")
    else:
        changes += ["network.bn_mode=inplace"] if recipe.network.bn_mode == "standard" else []
        changes += ["network.activation=leaky_relu"] if recipe.network.activation == "relu" else []
    published = checkpoints_of(name)
    if recipe.training.pretrained and published:  # images as its weights need them
        images = published[0].input
        changes += [f"input.mean={json.dumps(images.mean)}", f"input.std={json.dumps(images.std)}"]
    return changes


def _options(data: str, given: dict[str, Any], out: Path) -> Options:
    location = ("dataset", "train_split", "val_split", "train_samples", "val_samples", "download")
    run = (
        "resume",
        "overwrite",
        "pretrained",
        "workers",
        "cache_images",
        "keep",
        "snapshot_minutes",
        "max_broken",
        "best",
    )
    return Options(
        out=out, location=Location(data, **{name: given[name] for name in location}),
        command=command_line(), **{name: given[name] for name in run},
    )  # fmt: skip


class _Signals:
    """The first SIGINT or SIGTERM that was received."""

    received: int = 0

    def __bool__(self) -> bool:
        return self.received != 0


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    """Record SIGINT and SIGTERM instead of ending. A second SIGINT ends the process.

    A second SIGTERM does not: one may come from the cluster and one from torchrun.
    """
    signals = _Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def record(number: int, _: Any) -> None:
        signals.received = number
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, record)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
