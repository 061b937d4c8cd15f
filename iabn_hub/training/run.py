"""One run of a recipe on a dataset: what is checked before it, and the files it writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.errors import CheckpointError
from ..checkpoints.weights import BEST_WEIGHTS, WEIGHTS, read_snapshot
from ..datasets.digest import digest_of
from ..datasets.folders import DataError, Location
from ..datasets.transforms import Normalize
from ..evaluation import Metrics, Runtime, evaluate
from ..files import write_atomically
from ..models.pretrained import Pretrained, load_pretrained
from ..models.timm_config import EvalConfig, timm_config
from ..models.transfer import transfer
from ..recipes import Recipe, RecipeError, recipe_from
from ..schema import changed_fields
from ..versions import versions
from ..world import World
from .logging import RunLogger
from .network import build_network
from .results import RESULTS, write_results
from .snapshots import Snapshots
from .task import Task, make_task
from .trainer import Run, Trainer

LEAST_BROKEN = 10  # unreadable images that are tolerated in a small data set
# A run cannot be resumed with other values of these.
FIXED = (
    *("network.", "optimizer.batch_size", "optimizer.type"),
    *("training.seed", "training.repeats", "training.signed_scale"),
)


@dataclass(frozen=True)
class Options:
    """What a run does not need its recipe for: its data, its folder, and where it starts.

    Args:
        out: folder of the run.
        location: of the images.
        resume: 'auto' for the newest snapshot in `out`, or the path of one; None starts a new run.
        overwrite: delete the snapshots of an earlier run in `out`.
        pretrained: initial weights, see `load_pretrained`; '' for the published ones; None initialises randomly.
        workers: processes that read images, per rank.
        cache_images: decode each training image once, into a temporary file.
        keep: snapshots to keep, besides the best.
        snapshot_minutes: between snapshots within an epoch.
        max_broken: how many unreadable images are tolerated; None is 1 % of the training images, at least 10.
        best: model.safetensors is the best epoch instead of the last.
        command: that started the run, for metrics.json.
    """

    out: Path
    location: Location
    resume: str | None = None
    overwrite: bool = False
    pretrained: str | None = None
    workers: int = 2
    cache_images: bool = False
    keep: int = 2
    snapshot_minutes: float = 30
    max_broken: int | None = None
    best: bool = False
    command: str = ""


def train(recipe: Recipe, options: Options, world: World, stop_requested: Callable[[], bool]) -> bool:
    """Train, from the first check to the last file.

    Args:
        stop_requested: asked at every step; true ends the run there, with a snapshot.

    Returns:
        Whether the run is complete.

    Raises:
        RecipeError, DataError, CheckpointError: something that the run needs is missing or does not fit.
        InUseError: another process trains into the same folder.
        DivergedError: the loss is no longer finite.
    """
    _check_batches(recipe, world.size)
    with world.exclusive(options.out):
        return _train(recipe, options, world, stop_requested)


def _train(recipe: Recipe, options: Options, world: World, stop_requested: Callable[[], bool]) -> bool:
    snapshots = Snapshots(options.out / "snapshots", options.keep)
    resumed = _snapshot_to_resume(options, snapshots, world)
    task = make_task(recipe, options.location, world)
    listed = recipe.network.classes
    if task.classes and len(task.classes) != listed:
        recipe = recipe.with_classes(len(task.classes))
    skipped = SkippedFiles(world)
    pretrained = "" if options.pretrained is None and recipe.training.pretrained else options.pretrained
    network, notes, initial = _network(recipe, None if resumed else pretrained)
    run = _assemble(recipe, options, task, network.to(world.device), snapshots, skipped, stop_requested)
    skipped.limit = max(LEAST_BROKEN, run.loader.images // 100) if options.max_broken is None else options.max_broken
    trainer = Trainer(run, initial)
    if resumed:
        notes += _restore(trainer, *resumed)
        del resumed  # as large as the run itself
        complete = trainer.epoch >= recipe.optimizer.schedule.epochs and (options.out / "metrics.json").is_file()
        other_epoch = options.best and (options.out / BEST_WEIGHTS).is_file()
        if complete and (options.out / WEIGHTS).is_file() and not other_epoch:
            if world.is_primary:
                print(f"{options.out}: the run is complete; nothing is left to do")
            return True
    if world.is_primary:
        _check_space(trainer, options.keep)
        if options.overwrite:
            _delete_earlier(options.out, snapshots)
    images = recipe.optimizer.schedule.epochs * run.loader.steps * recipe.optimizer.batch_size
    log = RunLogger(options.out, world, images, trainer.step * recipe.optimizer.batch_size, trainer.step)
    skipped.log_to(log)
    try:
        if world.is_primary:
            write_atomically(options.out / "recipe.json", recipe.to_json().encode())
        log.info(_headline(run, listed, options.out))
        for note in (*task.notes, *notes):
            log.info(note)
        trainer.fit(log)
        if trainer.stopped:
            log.info(f"stopped at step {trainer.step:,} with a snapshot; continue with --resume auto")
            return False
        if world.is_primary:
            seconds = trainer.seconds()
            data = digest_of(task.val_loader(options.workers).dataset, options.location.root)
            origin = {"data": data, "command": options.command, "ranks": world.size, "versions": versions()}
            write_results(trainer, options.out, log, seconds, len(skipped.seen), options.best, origin)
        return True
    finally:
        log.close()


def _assemble(
    recipe: Recipe,
    options: Options,
    task: Task,
    network: nn.Module,
    snapshots: Snapshots,
    skipped: SkippedFiles,
    stop_requested: Callable[[], bool],
) -> Run:
    world = skipped.world
    normalize = Normalize(recipe.input.mean, recipe.input.std, recipe.input.lighting_train).to(world.device)
    val = task.val_loader(options.workers)
    runtime = Runtime(recipe.training.amp, recipe.training.channels_last)

    def validate(network: nn.Module) -> Metrics:
        metrics = task.new_metrics(recipe.network.classes, world.device)
        merged = evaluate(network, val, normalize, world, metrics, runtime, "validation")
        skipped.share(merged.skipped)
        return merged

    return Run(
        recipe=recipe, task=task, world=world, network=network, config=_config(recipe, network, task.classes),
        loader=task.train_loader(options.out, options.workers, options.cache_images),
        normalize=normalize, validate=validate,
        snapshots=snapshots, snapshot_minutes=options.snapshot_minutes, stop_requested=stop_requested,
        on_skipped=skipped,
    )  # fmt: skip


def _network(recipe: Recipe, pretrained: str | None) -> tuple[nn.Module, list[str], str]:
    """The network of a recipe, randomly initialised or pretrained; lines for the log; the initial weights' name."""
    torch.manual_seed(recipe.training.seed)
    network = build_network(recipe)
    if pretrained is None:
        return network, [], ""
    source = load_pretrained(pretrained or recipe.model, recipe.model)
    return network, _transfer(source, recipe, network), source.name


def _transfer(source: Pretrained, recipe: Recipe, network: Any) -> list[str]:
    """Copy weights; those of a classifier go into the backbone of a segmentation network."""
    if source.task == recipe.task:
        return [f"initial weights: {source.name}", *transfer(source.model, network)]
    if recipe.task == "classification":
        raise CheckpointError(f"{source.name} is for segmentation, {recipe.model} is a classifier")
    changes = transfer(source.model, network.backbone)
    return [f"initial weights of the backbone: {source.name}", *(c for c in changes if "classifier" not in c)]


def _config(recipe: Recipe, network: nn.Module, classes: tuple[str, ...] | None) -> dict[str, Any]:
    images, segmentation = recipe.input, recipe.segmentation
    is_segmentation = recipe.task == "segmentation"
    crop = images.crop_train if is_segmentation else images.crop_val
    evaluation = EvalConfig(
        images.scale_val, crop, images.mean, images.std, long_side=segmentation.long_side_val,
        ignore_index=segmentation.ignore_index,
    )  # fmt: skip
    return timm_config(network, recipe.model_options(), evaluation, classes, is_segmentation)


def _headline(run: Run, listed: int, out: Path) -> str:
    recipe, classes = run.recipe, run.task.classes
    count = f"{len(classes)} classes" if classes else f"{recipe.network.classes} classes, as the recipe says"
    if classes and len(classes) != listed:
        count += f" (the recipe: {listed})"
    return (
        f"{recipe.model} ({recipe.norms}) on {run.world.size} × {run.world.device}: {run.loader.images:,} images, "
        f"{count}; {recipe.optimizer.schedule.epochs} epochs of {run.loader.steps:,} steps of "
        f"{recipe.optimizer.batch_size}; results in {out}"
    )


def _check_batches(recipe: Recipe, ranks: int) -> None:
    batch, steps = recipe.optimizer.batch_size, recipe.training.accumulation_steps
    if batch % (ranks * steps):
        raise RecipeError(f"--batch-size {batch} is not divisible by {ranks} ranks × {steps} accumulation steps")
    micro = recipe.micro_batch(ranks)
    mixed = recipe.training.mixup or recipe.training.cutmix
    if micro < 2 or (mixed and micro % 2):
        need = "mixup and cutmix need an even number" if mixed else "batch statistics need 2 or more"
        raise RecipeError(
            f"--batch-size {batch} leaves {micro} images for each of {ranks} ranks × {steps} accumulation steps; {need}"
        )


# ---- resuming --------------------------------------------------------------------------------------------------------


def _snapshot_to_resume(options: Options, snapshots: Snapshots, world: World) -> tuple[Path, dict[str, Any]] | None:
    """The snapshot to resume from, if that was asked for; else the folder must not hold a run, unless overwritten."""
    named = Path(options.resume) if options.resume and options.resume != "auto" else None
    found = snapshots.latest() if world.is_primary and not named else None
    path: Path | None = named or world.broadcast_object(found[0] if found else None)
    holds_run = world.broadcast_object((path is not None and not named) or _results(options.out) != [])
    own = path and path.resolve().parent == snapshots.folder.resolve()
    if holds_run and not options.overwrite and not (options.resume and own):
        way = "choose another --out" if options.resume else "continue it with --resume auto, or pass --overwrite"
        raise ValueError(f"{options.out} already holds a run: {way}")
    if not options.resume or path is None:
        return None
    return path, found[1] if found else read_snapshot(path)


def _results(out: Path) -> list[Path]:
    return [out / name for name in RESULTS if (out / name).exists()]


def _delete_earlier(out: Path, snapshots: Snapshots) -> None:
    snapshots.remove_all()
    for path in _results(out):
        path.unlink()


def _restore(trainer: Trainer, path: Path, state: dict[str, Any]) -> list[str]:
    """Continue from a snapshot; returns lines for the log."""
    saved = recipe_from(state["recipe"], str(path)).to_dict()  # with defaults for sections that it did not have
    changes = changed_fields(trainer.run.recipe.to_dict(), saved)
    _check_resumable(trainer.run, changes, path, state)
    trainer.restore(state, path)
    notes = [f"changed since the snapshot: {name} from {old!r} to {new!r}" for name, (old, new) in changes.items()]
    return [*notes, f"resuming from {path}: epoch {trainer.epoch + 1}, step {trainer.step:,}"]


def _check_resumable(run: Run, changes: dict[str, tuple[Any, Any]], path: Path, state: dict[str, Any]) -> None:
    """Refuse a snapshot of another network, or with batches that start elsewhere."""
    for name, (old, new) in changes.items():
        if name.startswith(FIXED):
            raise RecipeError(
                f"{path}: Cannot resume: {name} changed from {old!r} to {new!r}; start a new run in another --out"
            )
    if state["classes"] != run.task.classes:
        raise DataError(
            f"{path}: Cannot resume: the classes of the data have changed; start a new run in another --out"
        )
    before, now = state["position"]["steps_per_epoch"], run.loader.steps
    if before != now:
        raise DataError(
            f"{path}: Cannot resume: an epoch had {before:,} steps and now has {now:,}, since the number of images has "
            "changed; start a new run in another --out, with --pretrained for these weights"
        )


def _check_space(trainer: Trainer, keep: int) -> None:
    """Refuse to start where the snapshots will not fit."""
    run = trainer.run
    network = sum(t.numel() * t.element_size() for t in run.network.state_dict().values())
    moments = {"SGD": 1, "Adam": 2}[run.recipe.optimizer.type]
    need = network * (1 + moments + (1 if trainer.ema else 0)) * (keep + 2)  # the best one, and the one being written
    place = run.snapshots.folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + run.snapshots.size()  # existing snapshots will be replaced
    if free < need:
        raise OSError(
            f"{place}: {free:,} bytes are free, the snapshots need {need:,}: pass a smaller --keep or another --out"
        )


class SkippedFiles:
    """Files that cannot be read: each is reported once, and too many end the run."""

    def __init__(self, world: World) -> None:
        self.limit, self.world = LEAST_BROKEN, world
        self.seen: dict[str, None] = {}  # in order of appearance
        self._report: Callable[[str], None] = print

    def log_to(self, log: RunLogger) -> None:
        """Report to a log from now on."""
        self._report = log.info

    def __call__(self, reasons: Iterable[str]) -> None:
        """Report files that this rank could not read."""
        for reason in reasons:
            if reason not in self.seen:
                self.seen[reason] = None
                self._report(f"skipped: {reason}")
        if len(self.seen) > self.limit:
            raise DataError(
                f"{len(self.seen)} images cannot be read, {self.limit} are tolerated (--max-broken); the last one: "
                f"{list(self.seen)[-1]}"
            )

    def share(self, reasons: Iterable[str]) -> None:
        """Report files that any rank could not read, and those that the other ranks have reported before."""
        for seen in self.world.all_gather_object(list(self.seen)):
            self(seen)
        self(reasons)
