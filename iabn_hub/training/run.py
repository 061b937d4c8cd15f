"""One run of a recipe on some images: what is checked before it, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..checkpoints.errors import CheckpointError
from ..checkpoints.export import save_safetensors, write_atomically
from ..models.transfer import transfer
from ..processes import Processes
from .journal import Journal
from .loop import Trainer
from .network import build_network, options_of
from .recipe import Recipe, RecipeError, recipe_from
from .snapshots import Snapshots, read_snapshot
from .sources import Source, load_source
from .splits import DataError, Location
from .tasks import TITLES, Outcome, micro_batch, spell, task_of
from .transforms import Normalize


@dataclass(frozen=True)
class Options:
    """What does not change the result of a run, and where it begins.

    Args:
        out: folder of the run.
        where: the images.
        resume: 'auto' for the newest snapshot in `out`, or the path of one; None begins anew.
        overwrite: remove the snapshots of an earlier run in `out`.
        pretrained: begin with these weights, see `load_source`; '' for the published ones; None draws them.
        workers: processes that read images, for each process that trains.
        keep: snapshots that stay, besides the best.
        minutes: from one snapshot within an epoch to the next.
        max_broken: unreadable images to put up with.
    """

    out: Path
    where: Location
    resume: str | None = None
    overwrite: bool = False
    pretrained: str | None = None
    workers: int = 2
    keep: int = 2
    minutes: float = 30
    max_broken: int = 0


def train(recipe: Recipe, options: Options, everyone: Processes, stop: Callable[[], bool]) -> bool:
    """One run from its first check to its last file.

    Args:
        stop: asked at every step; true ends the run there, with a snapshot.

    Returns:
        Whether it came to its end.

    Raises:
        RecipeError, DataError, CheckpointError: what the run needs is not there or does not go together.
        DivergedError: the loss is no longer finite.
    """
    started = time.time()
    training, where = recipe.training, options.where
    _check_batches(recipe, everyone.count)
    snapshots = Snapshots(options.out / "snapshots", options.keep)
    found = _start(options, snapshots, everyone)
    task = task_of(recipe)
    source, held_out, classes = task.open(recipe, where, micro_batch(recipe, everyone.count))
    listed = recipe.network.classes
    if classes and len(classes) != listed:
        recipe = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, classes=len(classes)))
    loader, val = task.loaders(recipe, source, held_out, options.out, options.workers, everyone)
    normalize = Normalize(recipe.input, recipe.input.lighting_train).to(everyone.device)

    notes: list[str] = []
    torch.manual_seed(training.seed)
    network = build_network(recipe)
    if options.pretrained is not None and not found:
        begin = load_source(options.pretrained or recipe.model, recipe.model)
        notes = _begin_with(begin, recipe, network)
    network = network.to(everyone.device)
    broken = _Broken(options.max_broken, everyone)

    def validate(network: nn.Module) -> Outcome:
        score = task.evaluate(network, val, normalize, everyone)
        broken.share(score.broken)
        return score

    trainer = Trainer(
        recipe, task, network, loader, normalize, validate, everyone, snapshots, options.minutes, stop, broken
    )
    trainer.classes = classes
    if found:
        path, state = found
        state["recipe"] = dataclasses.asdict(recipe_from(state["recipe"], str(path)))  # sections that it did not know
        _check_same(recipe, classes, loader.steps, path, state)
        trainer.restore(state, path)
        notes += [f"changed since the snapshot: {change}" for change in _changes(recipe, state["recipe"])]
        notes.append(f"going on from {path}: epoch {trainer.epoch + 1}, step {trainer.step:,}")
        del found, state  # as large as the run itself
    if everyone.first:
        _check_space(trainer, options.keep)
        if options.overwrite:
            snapshots.remove_all()
            for earlier in _results(options.out):
                earlier.unlink()
    batch, epochs = recipe.optimizer.batch_size, recipe.optimizer.schedule.epochs
    done = trainer.step * batch
    journal = Journal(options.out, everyone, epochs * loader.steps * batch, done, trainer.step)
    broken.say = journal.say
    try:
        if everyone.first:
            write_atomically(options.out / "recipe.json", recipe.to_json().encode())
        count = f"{len(classes)} classes" if classes else f"{recipe.network.classes} classes, as the recipe says"
        if classes and len(classes) != listed:
            count += f" (the recipe: {listed})"
        journal.say(
            f"{recipe.model} ({recipe.norm_layer}) on {everyone.count} × {everyone.device}: {loader.images:,} images, "
            f"{count}; {epochs} epochs of {loader.steps:,} steps of {batch}; results in {options.out}"
        )
        for note in notes:
            journal.say(note)
        trainer.run(journal)
        if trainer.stopped:
            journal.say(f"stopped at step {trainer.step:,} with a snapshot; go on with --resume auto")
            return False
        if everyone.first:
            _finish(recipe, options.out, trainer, classes, journal, time.time() - started)
        return True
    finally:
        journal.close()


def _begin_with(begin: Source, recipe: Recipe, network: nn.Module) -> list[str]:
    """Take weights over; a classifier's go into the body of a segmentation network. Returns what there is to say."""
    if begin.task == recipe.task:
        return [f"begins with the weights of {begin.text}", *transfer(begin.model, network)]
    if recipe.task == "classification":
        raise CheckpointError(f"{begin.text} is for segmentation, {recipe.model} a classifier")
    body: Any = network.body
    said = transfer(begin.model, body)
    return [f"the body begins with the weights of {begin.text}", *(s for s in said if "classifier" not in s)]


def _check_batches(recipe: Recipe, count: int) -> None:
    batch, passes = recipe.optimizer.batch_size, recipe.training.accumulate
    if batch % (count * passes):
        raise RecipeError(f"--batch-size {batch} cannot be shared evenly by {count} processes × {passes} passes")
    micro = micro_batch(recipe, count)
    mixed = recipe.training.mixup or recipe.training.cutmix
    if micro < 2 or (mixed and micro % 2):
        need = "mixup and cutmix need an even number" if mixed else "normalising needs 2 or more"
        raise RecipeError(f"--batch-size {batch} leaves {micro} to each of {count} processes × {passes} passes; {need}")


def _start(options: Options, snapshots: Snapshots, everyone: Processes) -> tuple[Path, dict[str, Any]] | None:
    """The snapshot to go on from, if that was asked for; else the folder must hold no run, or be given up."""
    named = Path(options.resume) if options.resume and options.resume != "auto" else None
    found = snapshots.latest() if everyone.first and not named else None
    path: Path | None = named or everyone.from_first(found[0] if found else None)
    holds_one = everyone.from_first((path is not None and not named) or _results(options.out) != [])
    own = path and path.resolve().parent == snapshots.folder.resolve()
    if holds_one and not options.overwrite and not (options.resume and own):
        way = "name another --out" if options.resume else "go on with it by --resume auto, or pass --overwrite"
        raise ValueError(f"{options.out} holds a run already: {way}")
    if not options.resume or path is None:
        return None
    return path, found[1] if found else read_snapshot(path)


def _results(out: Path) -> list[Path]:
    """What a finished run has left in a folder."""
    names = ("model.safetensors", "config.json", "metrics.json", "report.html")
    return [out / name for name in names if (out / name).exists()]


def _changes(recipe: Any, saved: dict[str, Any], prefix: str = "") -> list[str]:
    today = recipe if isinstance(recipe, dict) else dataclasses.asdict(recipe)
    found = []
    for key, value in today.items():
        name, before = f"{prefix}{key}", saved.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += _changes(value, before, f"{name}.")
        elif value != before:
            found.append(f"{name} {before!r} to {value!r}")
    return found


def _check_same(recipe: Recipe, classes: tuple[str, ...] | None, steps: int, path: Path, state: dict[str, Any]) -> None:
    """Refuse to go on from a snapshot of another network, or with batches that begin elsewhere."""
    fixed = (
        *("network.", "optimizer.batch_size", "optimizer.type"),
        *("training.seed", "training.repeats", "training.signed_scale"),
    )
    for change in _changes(recipe, state["recipe"]):
        if change.startswith(fixed):
            raise RecipeError(f"{path}: this run cannot go on with {change}; begin a new one in another --out")
    if state["classes"] != classes:
        raise DataError(f"{path}: was trained on other classes than the data has now; begin a new run in another --out")
    if state["position"]["steps_per_epoch"] != steps:
        raise DataError(
            f"{path}: an epoch had {state['position']['steps_per_epoch']:,} steps, now it has {steps:,}: the number of "
            "images has changed; begin a new run in another --out, with --pretrained to keep what was learnt"
        )


def _check_space(trainer: Trainer, keep: int) -> None:
    """Refuse to begin where the snapshots will not fit."""
    snapshots = trainer.snapshots
    network = sum(t.numel() * t.element_size() for t in trainer.network.state_dict().values())
    moments = {"SGD": 1, "Adam": 2}[trainer.recipe.optimizer.type]
    need = network * (1 + moments + (1 if trainer.ema else 0)) * (keep + 2)  # the best one, and the one being written
    place = snapshots.folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + snapshots.size()  # those that are there make room
    if free < need:
        raise OSError(
            f"{place}: {free:,} bytes are free, the snapshots need {need:,}: pass a smaller --keep or another --out"
        )


class _Broken:
    """Files that cannot be read: each is said once, and too many end the run."""

    def __init__(self, limit: int, everyone: Processes) -> None:
        self.limit, self.everyone = limit, everyone
        self.seen: dict[str, None] = {}  # in the order of their appearance
        self.say: Callable[[str], None] = print

    def __call__(self, reasons: Iterable[str]) -> None:
        """This process has met these."""
        for reason in reasons:
            if reason not in self.seen:
                self.seen[reason] = None
                self.say(f"skipped: {reason}")
        if len(self.seen) > self.limit:
            raise DataError(
                f"{len(self.seen)} images cannot be read, --max-broken allows {self.limit}; the last one: "
                f"{list(self.seen)[-1]}"
            )

    def share(self, reasons: Iterable[str]) -> None:
        """All processes have met these; and now each learns what the others have met before."""
        for seen in self.everyone.gather(list(self.seen)):
            self(seen)
        self(reasons)


def _finish(recipe: Recipe, out: Path, trainer: Trainer, classes: Any, journal: Journal, seconds: float) -> None:
    """The weights and what there is to say about them."""
    last = trainer.rows[-1]
    state = {name: value.detach().cpu().contiguous() for name, value in trainer.judged.state_dict().items()}
    weights = out / "model.safetensors"
    save_safetensors(state, weights, {"arch": recipe.model, "iabn_hub": __version__})
    write_atomically(out / "config.json", (json.dumps(_config(recipe, classes), indent=2) + "\n").encode())
    judged = trainer.task.judged
    result = {name[4:]: value for name, value in last.items() if name.startswith("val_")}
    result |= trainer.details
    rows = [{name: value if math.isfinite(value) else None for name, value in row.items()} for row in trainer.rows]
    best = max(trainer.rows, key=lambda row: row[f"val_{judged[0]}"])
    report = {"model": recipe.model, "classes": classes, "result": result, "seconds": round(seconds, 1),
              "best": {"epoch": best["epoch"], judged[0]: best[f"val_{judged[0]}"]}, "epochs": rows}  # fmt: skip
    write_atomically(out / "metrics.json", (json.dumps(report, indent=1) + "\n").encode())
    facts = {
        **{TITLES[name]: f"{last[f'val_{name}']:.2f} %" for name in judged},
        "best epoch": f"{best['epoch']}, {best[f'val_{judged[0]}']:.2f} %", "images": f"{trainer.loader.images:,}",
        "normalisation": recipe.norm_layer, "device": str(trainer.processes.device),
        "processes": trainer.processes.count, "time": f"{seconds / 60:.1f} minutes, of the last start",
    }  # fmt: skip
    journal.report(recipe.model, trainer.rows, facts)
    journal.say(f"{weights}  {weights.stat().st_size:,} bytes  {spell(result, judged[:1])}  {out / 'report.html'}")


def _config(recipe: Recipe, classes: tuple[str, ...] | None) -> dict[str, Any]:
    """timm's description of the weights beside it, by which `local-dir:` and `hf-hub:` rebuild the network."""
    images, options = recipe.input, options_of(recipe)
    classes_count = options.pop("num_classes")
    if options["norm_layer"] == "iabn_sync":
        options["norm_layer"] = "iabn"  # it is the same once it is trained
    scenes = recipe.segmentation
    crop = images.crop_val if recipe.task == "classification" else images.crop_train
    scale = images.scale_val if images.scale_val > 0 and recipe.task == "classification" else crop
    return {
        "architecture": recipe.model,
        "num_classes": classes_count,
        **({"label_names": list(classes)} if classes else {}),
        "model_args": options,
        **({"longest": scenes.longest_val, "ignore": scenes.ignore} if recipe.task == "segmentation" else {}),
        "pretrained_cfg": {
            "num_classes": classes_count,
            "input_size": [3, crop, crop],
            "crop_pct": crop / scale,
            "interpolation": "bilinear",
            "mean": images.mean,
            "std": images.std,
            "first_conv": "conv1" if recipe.task == "classification" else "body.conv1",
            "classifier": "fc",
        },
    }
