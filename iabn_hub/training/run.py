"""The command that trains: `tools/train.py RECIPE DATA`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..checkpoints.errors import CheckpointError
from ..checkpoints.export import save_safetensors, write_atomically
from .data import DataError, Location, TrainLoader, check_alike, classes_of, open_split, val_loader
from .evaluate import Score, evaluate
from .journal import Journal
from .loop import DivergedError, Trainer
from .network import build_network
from .processes import Processes, processes
from .recipe import Recipe, RecipeError, read_recipe
from .snapshots import Snapshots, read_snapshot
from .transforms import Normalize, train_transform, val_transform

DESCRIPTION = """Train a network as a recipe says, or fine-tune it, on one device or many.

DATA is a folder with train/CLASS/* and val/CLASS/*, or train.tar and val.tar. With --dataset it is what timm reads under
that name: shards (wds), Hugging Face datasets (hfds/NAME, streamed: hfids/NAME), torchvision's (torch/cifar10).

The folder --out receives snapshots/ (to go on from, the best one as best.pt), recipe.json (with every change),
train.log, metrics.csv, tensorboard/ and, at the end, model.safetensors, config.json, metrics.json and report.html.

A run that was stopped, or killed at any moment, goes on with the same command and --resume auto, and ends with the same
weights. Ctrl-C and SIGTERM save a snapshot first."""
EXAMPLES = """examples:
  python tools/train.py test_resnet_iabn.mnist data/mnist --out runs/digits
  python tools/train.py resnet50_iabn.modern data/birds --pretrained --epochs 20 --set optimizer.learning_rate=0.02
  torchrun --standalone --nproc-per-node 8 tools/train.py resnet50_iabn.sync_lr_512_in1k /data/imagenet --workers 12
"""
SHORTHANDS = {
    "epochs": "optimizer.schedule.epochs",
    "batch_size": "optimizer.batch_size",
    "accumulate": "training.accumulate",
    "amp": "training.amp",
    "channels_last": "training.channels_last",
    "compile": "training.compile",
    "seed": "training.seed",
}


def parser(recipes: Path) -> argparse.ArgumentParser:
    """The command's arguments; `recipes` is the folder in which a recipe's bare name is looked for."""
    p = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.set_defaults(recipes=recipes)
    p.add_argument("recipe", metavar="RECIPE", help=f"a JSON file, or a name in {recipes.name}/ ('list' shows them)")
    p.add_argument("data", metavar="DATA", nargs="?", default="", help="a folder, see above")
    p.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")
    start = p.add_argument_group("where it begins")
    start.add_argument("--resume", metavar="auto|FILE", help="go on from the newest snapshot in --out, or from this one")
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
    add_location(p)
    return p


def add_location(p: argparse.ArgumentParser) -> None:
    """The arguments that say where images are."""
    data = p.add_argument_group("data other than folders")
    data.add_argument("--dataset", default="", help="timm's name: wds, hfds/NAME, hfids/NAME, torch/cifar10 …")
    data.add_argument("--train-split", default="train", help="its name, or shards: 'train-{0000..0099}.tar'")
    data.add_argument("--val-split", default="val")
    data.add_argument("--train-samples", type=int, metavar="N", help="images in a stream that does not say it")
    data.add_argument("--val-samples", type=int, metavar="N")
    data.add_argument("--download", action="store_true", help="let the dataset's package fetch it")


def location(arguments: argparse.Namespace) -> Location:
    """What the arguments say about where images are."""
    names = ("dataset", "train_split", "val_split", "train_samples", "val_samples", "download")
    return Location(arguments.data, **{name: getattr(arguments, name) for name in names})


def main(recipes: Path, argv: list[str] | None = None) -> int:
    """Train; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped by SIGINT and SIGTERM."""
    p = parser(recipes)
    arguments = p.parse_args(argv)
    if arguments.recipe == "list":
        print("\n".join(sorted(path.stem for path in recipes.glob("*.json"))))
        return 0
    if not arguments.data and not arguments.dataset:
        p.error("name the folder of the images: RECIPE DATA")
    for name, low in (("workers", 0), ("keep", 1), ("max_broken", 0), ("minutes", 0)):
        if getattr(arguments, name) < low:
            p.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it must be {low} or more")
    if arguments.resume and (arguments.overwrite or arguments.pretrained is not None):
        p.error("--resume goes on with what is there: leave --overwrite and --pretrained out")
    try:
        recipe = _recipe(arguments)
        with processes(arguments.device) as everyone, _signals() as signals:
            return train(recipe, arguments, everyone, signals)
    except RecipeError as e:
        return _complain(e, 2)
    except (CheckpointError, DataError, DivergedError, ValueError, OSError) as e:
        return _complain(e, 1)
    except KeyboardInterrupt:
        return _complain("interrupted; the snapshots in --out are whole, go on with --resume auto", 130)


def _complain(message: object, code: int) -> int:
    print(f"train.py: {message}", file=sys.stderr)
    return code


def _recipe(arguments: argparse.Namespace) -> Recipe:
    path = Path(arguments.recipe)
    if not path.is_file() and not path.suffix == ".json":
        path = arguments.recipes / f"{arguments.recipe}.json"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in arguments.recipes.glob("*.json")))
        raise RecipeError(f"{arguments.recipe}: there is no such file or recipe; there are {names}")
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
    return read_recipe(path, changes)


class _Signals:
    """The first SIGINT or SIGTERM, once it has come."""

    received: int = 0

    def __bool__(self) -> bool:
        return self.received != 0


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one is as deadly as ever."""
    signals = _Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        signals.received = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(recipe: Recipe, arguments: argparse.Namespace, everyone: Processes, signals: _Signals) -> int:
    """One run from its first check to its last file; returns the exit code."""
    started = time.time()
    training, where = recipe.training, location(arguments)
    _check_batches(recipe, everyone.count)
    snapshots = Snapshots(arguments.out / "snapshots", arguments.keep)
    found = _start(arguments, snapshots, everyone)
    micro = recipe.optimizer.batch_size // training.accumulate // everyone.count
    source = open_split(where, where.train_split, True, micro, training.seed)
    held_out = open_split(where, where.val_split)
    check_alike(where, source, held_out)
    classes = classes_of(source)
    listed = recipe.network.classes
    if classes and len(classes) != listed:
        recipe = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, classes=len(classes)))
    loader = TrainLoader(
        source, train_transform(recipe), recipe.optimizer.batch_size, training.accumulate, training.repeats,
        training.seed, arguments.workers, everyone,
    )  # fmt: skip
    images = recipe.input
    val = val_loader(held_out, val_transform(images.scale_val, images.crop_val), micro, arguments.workers, everyone)
    normalize = Normalize(images, images.lighting_train).to(everyone.device)

    torch.manual_seed(training.seed)
    pretrained = arguments.pretrained
    network = build_network(recipe, pretrained == "", pretrained or None).to(everyone.device)
    broken = _Broken(arguments.max_broken)

    def validate(network: nn.Module) -> Score:
        score = evaluate(
            network, val, normalize, everyone, amp=training.amp, channels_last=training.channels_last, text="validation"
        )
        broken(tuple(score.broken))
        return score

    trainer = Trainer(
        recipe, network, loader, normalize, validate, everyone, snapshots, arguments.minutes, signals.__bool__, broken
    )
    if found:
        _check_same(recipe, classes, *found)
        trainer.restore(found[1], found[0])
    _check_space(arguments.out, trainer, arguments.keep)
    batch, epochs = recipe.optimizer.batch_size, recipe.optimizer.schedule.epochs
    done = trainer.step * batch
    journal = Journal(arguments.out, everyone, epochs * loader.steps * batch, done, trainer.step)
    broken.say = journal.say
    try:
        if everyone.first:
            write_atomically(arguments.out / "recipe.json", recipe.to_json().encode())
        count = f"{len(classes)} classes" if classes else f"{recipe.network.classes} classes, as the recipe says"
        if classes and len(classes) != listed:
            count += f" (the recipe: {listed})"
        journal.say(
            f"{recipe.model} ({recipe.norm_layer}) on {everyone.count} × {everyone.device}: {loader.images:,} images, "
            f"{count}; {epochs} epochs of {loader.steps:,} steps of {batch}; results in {arguments.out}"
        )
        if found:
            for change in _changes(recipe, found[1]["recipe"]):
                journal.say(f"changed since the snapshot: {change}")
            journal.say(f"going on from {found[0]}: epoch {trainer.epoch + 1}, step {trainer.step:,}")
        trainer.run(journal)
        if trainer.stopped:
            number = signals.received or signal.SIGTERM
            journal.say(f"stopped at step {trainer.step:,} with a snapshot; go on with --resume auto")
            return 128 + number
        if everyone.first:
            _finish(recipe, arguments, trainer, classes, journal, time.time() - started)
        return 0
    finally:
        journal.close()


def _check_batches(recipe: Recipe, count: int) -> None:
    batch, passes = recipe.optimizer.batch_size, recipe.training.accumulate
    if batch % (count * passes):
        raise RecipeError(f"--batch-size {batch} cannot be shared evenly by {count} processes × {passes} passes")
    micro = batch // count // passes
    mixed = recipe.training.mixup or recipe.training.cutmix
    if micro < 2 or (mixed and micro % 2):
        need = "an even number of images, for mixup and cutmix" if mixed else "2 images or more, to normalise over"
        raise RecipeError(f"--batch-size {batch} leaves {micro} to each of {count} processes × {passes} passes: need {need}")


def _start(
    arguments: argparse.Namespace, snapshots: Snapshots, everyone: Processes
) -> tuple[Path, dict[str, Any]] | None:
    """The snapshot to go on from, if that was asked for; else a folder that holds no run."""
    if arguments.resume and arguments.resume != "auto":
        return Path(arguments.resume), read_snapshot(Path(arguments.resume))
    found = snapshots.latest() if everyone.first else None
    path: Path | None = everyone.from_first(found[0] if found else None)
    if arguments.resume:
        return (path, found[1] if found else read_snapshot(path)) if path else None
    if path and not arguments.overwrite:
        raise ValueError(f"{arguments.out} holds a run already: go on with it by --resume auto, or pass --overwrite")
    if path and everyone.first:
        snapshots.remove_all()
    return None


def _changes(recipe: Recipe, saved: dict[str, Any], prefix: str = "") -> list[str]:
    today = recipe if isinstance(recipe, dict) else dataclasses.asdict(recipe)
    found = []
    for key, value in today.items():
        name, before = f"{prefix}{key}", saved.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += _changes(value, before, f"{name}.")
        elif value != before:
            found.append(f"{name} {before!r} to {value!r}")
    return found


def _check_same(recipe: Recipe, classes: tuple[str, ...] | None, path: Path, state: dict[str, Any]) -> None:
    """Refuse to go on from a snapshot of another network, or with batches that begin elsewhere."""
    fixed = ("network.", "optimizer.batch_size", "optimizer.type", "training.seed", "training.repeats")
    for change in _changes(recipe, state["recipe"]):
        if change.startswith(fixed):
            raise RecipeError(f"{path}: this run cannot go on with {change}; begin a new one in another --out")
    ...


def _check_space(out: Path, trainer: Trainer, keep: int) -> None:
    """Refuse to begin where the snapshots will not fit."""
    network = sum(t.numel() * t.element_size() for t in trainer.network.state_dict().values())
    moments = {"SGD": 1, "Adam": 2}[trainer.recipe.optimizer.type]
    need = network * (1 + moments + (1 if trainer.ema else 0)) * (keep + 2)  # the best one, and the one being written
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise OSError(f"{place}: {free:,} bytes are free, the snapshots need {need:,}: pass a smaller --keep or another --out")


class _Broken:
    """Files that cannot be read: each is said once, and too many end the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen: set[str] = set()
        self.say: Any = print

    def __call__(self, reasons: tuple[str, ...]) -> None:
        for reason in reasons:
            if reason not in self.seen:
                self.seen.add(reason)
                self.say(f"skipped: {reason}")
        if len(self.seen) > self.limit:
            raise DataError(
                f"{len(self.seen)} images cannot be read, --max-broken allows {self.limit}; the last one: {reasons[-1]}"
            )


def _finish(
    recipe: Recipe, arguments: argparse.Namespace, trainer: Trainer, classes: Any, journal: Journal, seconds: float
) -> None:
    """The weights and what there is to say about them."""
    out: Path = arguments.out
    last = trainer.rows[-1]
    state = {name: value.detach().cpu().contiguous() for name, value in trainer.judged.state_dict().items()}
    weights = out / "model.safetensors"
    save_safetensors(state, weights, {"arch": recipe.model, "iabn_hub": __version__})
    write_atomically(out / "config.json", (json.dumps(_config(recipe, classes), indent=2) + "\n").encode())
    result = {name: last[f"val_{name}"] for name in ("top1", "top5", "loss")}
    best = max(trainer.rows, key=lambda row: row["val_top1"])
    report = {"model": recipe.model, "classes": classes, "result": result, "seconds": round(seconds, 1),
              "best": {"epoch": best["epoch"], "top1": best["val_top1"]}, "epochs": trainer.rows}  # fmt: skip
    write_atomically(out / "metrics.json", (json.dumps(report, indent=1) + "\n").encode())
    facts = {
        "top-1": f"{last['val_top1']:.2f} %", "top-5": f"{last['val_top5']:.2f} %",
        "best epoch": f"{best['epoch']}, {best['val_top1']:.2f} %", "images": f"{trainer.loader.images:,}",
        "normalisation": recipe.norm_layer, "device": str(trainer.processes.device),
        "processes": trainer.processes.count, "time": f"{seconds / 60:.1f} minutes, of the last start",
    }  # fmt: skip
    journal.report(recipe.model, trainer.rows, facts)
    journal.say(f"{weights}  {weights.stat().st_size:,} bytes  top-1 {last['val_top1']:.2f} %  {out / 'report.html'}")


def _config(recipe: Recipe, classes: tuple[str, ...] | None) -> dict[str, Any]:
    """timm's description of the weights beside it, by which `local-dir:` and `hf-hub:` rebuild the network."""
    images, network = recipe.input, recipe.network
    options: dict[str, Any] = {"activation": network.activation, "activation_param": network.activation_param}
    if recipe.norm_layer == "abn":
        options["norm_layer"] = "abn"
    if recipe.has_stem:
        options["input_3x3"] = network.input_3x3
    scale = images.scale_val if images.scale_val > 0 else images.crop_val
    return {
        "architecture": recipe.model,
        "num_classes": network.classes,
        **({"label_names": list(classes)} if classes else {}),
        "model_args": options,
        "pretrained_cfg": {
            "num_classes": network.classes,
            "input_size": [3, images.crop_val, images.crop_val],
            "crop_pct": images.crop_val / scale,
            "interpolation": "bilinear",
            "mean": images.mean,
            "std": images.std,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
