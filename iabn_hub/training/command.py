"""The command that trains: `tools/train.py RECIPE DATA`."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.errors import CheckpointError
from ..commands import FAILED, INTERRUPTED, OK, USAGE, check_least, complain
from ..processes import processes
from .loop import DivergedError
from .recipe import Recipe, RecipeError, find_recipe, read_recipe, recipe_names
from .run import Options, train
from .splits import DataError, Location

CLASSIFIERS, SCENES = (
    """Train a network as a recipe says, or fine-tune it, on one device or many.

DATA is a folder with train/CLASS/* and val/CLASS/*, or train.tar and val.tar. With --dataset it is what timm reads
under that name: shards (wds), Hugging Face datasets (hfds/NAME, streamed: hfids/NAME), torchvision's (torch/cifar10).
""",
    """Train a segmentation network as a recipe says, or fine-tune it, on one device or many.

DATA is a folder with train/images/* and train/labels/*.png of the same names, val likewise; a label is the number of
the class of each pixel, and classes.json the list of their names. Or it is the folder of Mapillary Vistas (training/,
validation/), or of Cityscapes (leftImg8bit/, gtFine/).
""",
)
RUN = """
The folder --out receives snapshots/ (to go on from, the best one as best.pt), recipe.json (with every change),
train.log, metrics.csv, tensorboard/ and, at the end, model.safetensors, config.json, metrics.json and report.html.

A run that was stopped, or killed at any moment, goes on with the same command and --resume auto, and ends with the same
weights. Ctrl-C and SIGTERM save a snapshot first."""
CLASSIFIER_EXAMPLES = """examples:
  python tools/train.py test_resnet_iabn.mnist data/mnist --out runs/digits
  python tools/train.py resnet50_iabn.modern data/birds --pretrained --epochs 20 --set optimizer.learning_rate=0.02
  torchrun --standalone --nproc-per-node 8 tools/train.py resnet50_iabn.sync_lr_512_in1k /data/imagenet --workers 12
"""
SCENE_EXAMPLES = """examples:
  python tools/train_segmentation.py test_resnet_deeplab3_iabn.shapes data/shapes --out runs/shapes
  python tools/train_segmentation.py wider_resnet38_deeplab3_iabn.cityscapes /data/cityscapes --pretrained
  torchrun --standalone --nproc-per-node 8 tools/train_segmentation.py wider_resnet38_deeplab3_iabn.vistas /data/vistas
"""


class Program(NamedTuple):
    """A name of the command, with what it says of itself."""

    name: str
    task: str
    description: str
    examples: str


TRAIN = Program("train.py", "classification", CLASSIFIERS + RUN, CLASSIFIER_EXAMPLES)
TRAIN_SEGMENTATION = Program("train_segmentation.py", "segmentation", SCENES + RUN, SCENE_EXAMPLES)
PROGRAMS = {program.task: program for program in (TRAIN, TRAIN_SEGMENTATION)}
SHORTHANDS = {
    "epochs": "optimizer.schedule.epochs",
    "batch_size": "optimizer.batch_size",
    "accumulate": "training.accumulate",
    "amp": "training.amp",
    "channels_last": "training.channels_last",
    "compile": "training.compile",
    "seed": "training.seed",
}


def parser(recipes: Path, program: Program = TRAIN) -> argparse.ArgumentParser:
    """The command's arguments; `recipes` is the folder in which a recipe's bare name is looked for."""
    p = argparse.ArgumentParser(
        description=program.description, epilog=program.examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.set_defaults(recipes=recipes)
    p.add_argument("recipe", metavar="RECIPE", help=f"a JSON file, or a name in {recipes.name}/ ('list' shows them)")
    p.add_argument("data", metavar="DATA", nargs="?", default="", help="a folder, see above")
    p.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")
    start = p.add_argument_group("where it begins")
    start.add_argument(
        "--resume", metavar="auto|FILE", help="go on from the newest snapshot in --out, or from this one"
    )
    start.add_argument("--overwrite", action="store_true", help="remove an earlier run's snapshots in --out")
    start.add_argument(
        "--pretrained", metavar="FILE", nargs="?", const="", help="begin with the published weights, or with these"
    )
    what = p.add_argument_group("what differs from the recipe")
    what.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="optimizer.learning_rate=0.05")
    what.add_argument("--model", metavar="NAME", help="another network: resnet50_iabn, resnext101_abn …")
    what.add_argument("--epochs", type=int)
    what.add_argument("--batch-size", type=int, help="images a step, over all processes and passes")
    what.add_argument("--accumulate", type=int, metavar="N", help="forward and backward passes that share a step")
    what.add_argument("--amp", choices=("off", "bf16", "fp16"), help="mixed precision")
    what.add_argument("--channels-last", action="store_true", default=None)
    what.add_argument("--compile", action="store_true", default=None, help="through torch.compile")
    what.add_argument("--seed", type=int)
    how = p.add_argument_group("how it runs")
    how.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    how.add_argument("--workers", type=int, default=2, help="processes that read images, per process (default: 2)")
    how.add_argument("--keep", type=int, default=2, help="snapshots that stay, besides the best (default: 2)")
    how.add_argument("--minutes", type=float, default=30, help="between snapshots within an epoch (default: 30)")
    how.add_argument("--max-broken", type=int, default=0, help="unreadable images to put up with (default: 0)")
    if program is TRAIN:
        _add_datasets(p)
    return p


def _add_datasets(p: argparse.ArgumentParser) -> None:
    data = p.add_argument_group("data other than folders")
    data.add_argument("--dataset", default="", help="timm's name: wds, hfds/NAME, hfids/NAME, torch/cifar10 …")
    data.add_argument("--train-split", default="train", help="its name, or shards: 'train-{0000..0099}.tar'")
    data.add_argument("--val-split", default="val")
    data.add_argument("--train-samples", type=int, metavar="N", help="images in a stream that does not say it")
    data.add_argument("--val-samples", type=int, metavar="N")
    data.add_argument("--download", action="store_true", help="let the dataset's package fetch it")


def _options(arguments: argparse.Namespace) -> Options:
    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}

    images = given("dataset", "train_split", "val_split", "train_samples", "val_samples", "download")
    how = given("out", "resume", "overwrite", "pretrained", "workers", "keep", "minutes", "max_broken")
    return Options(where=Location(arguments.data, **images), **how)


def main(recipes: Path, argv: list[str] | None = None, program: Program = TRAIN) -> int:
    """Train; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped by SIGINT and SIGTERM."""
    p = parser(recipes, program)
    arguments = p.parse_args(argv)
    if arguments.recipe == "list":
        names = recipe_names(recipes)
        print("\n".join(n for n in names if read_recipe(recipes / f"{n}.json").task == program.task))
        return OK
    if not arguments.data and not getattr(arguments, "dataset", ""):
        p.error("name the folder of the images: RECIPE DATA")
    check_least(p, arguments, workers=0, keep=1, max_broken=0, minutes=0)
    if arguments.resume and (arguments.overwrite or arguments.pretrained is not None):
        p.error("--resume goes on with what is there: leave --overwrite and --pretrained out")
    try:
        recipe = _recipe(arguments, program)
        with processes(arguments.device) as everyone, _signals() as signals:
            finished = train(recipe, _options(arguments), everyone, signals.__bool__)
            return OK if finished else 128 + (signals.received or signal.SIGTERM)
    except RecipeError as e:
        return complain(program.name, e, USAGE)
    except (CheckpointError, DataError, DivergedError, ValueError, OSError) as e:
        return complain(program.name, e, FAILED)
    except KeyboardInterrupt:
        return complain(program.name, "interrupted; the snapshots are whole, go on with --resume auto", INTERRUPTED)


def _recipe(arguments: argparse.Namespace, program: Program) -> Recipe:
    path = find_recipe(arguments.recipe, arguments.recipes)
    changes = list(arguments.set)
    if arguments.model:
        arch, _, kind = arguments.model.rpartition("_")
        if kind not in ("iabn", "abn"):
            raise RecipeError(f"--model is {arguments.model!r}, not a name such as resnet50_iabn")
        changes.append(f"network.arch={arch}")
        if kind == "abn":
            changes.append("network.bn_mode=standard")
    for name, key in SHORTHANDS.items():
        value = getattr(arguments, name)
        if value is not None:
            changes.append(f"{key}={json.dumps(value)}")
    arguments.out = arguments.out or Path("runs") / path.stem
    recipe = read_recipe(path, changes)
    if recipe.task != program.task:
        raise RecipeError(f"{path}: is for {recipe.task}: use tools/{PROGRAMS[recipe.task].name}")
    return recipe


class _Signals:
    """The first SIGINT or SIGTERM, once it has come."""

    received: int = 0

    def __bool__(self) -> bool:
        return self.received != 0


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Note SIGINT and SIGTERM instead of dying of them. A second SIGINT is as deadly as ever.

    A second SIGTERM is not: one may come from the cluster and one from torchrun.
    """
    signals = _Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        signals.received = number
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
