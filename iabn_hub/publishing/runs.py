"""What a training run tells about its weights: their metrics, and how they were trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.catalogue import Result, records
from ..checkpoints.errors import CheckpointError
from ..checkpoints.weights import BEST, BEST_WEIGHTS, WEIGHTS, read_snapshot
from ..models.pretrained import Pretrained
from ..recipes import Recipe, read_recipe, recipe_from
from ..recipes.metrics import FEWEST_FOR_TOP5, RunMetrics, read_metrics
from .card import CURVES, PICTURES


@dataclass(frozen=True)
class RunFacts:
    """Of the weights of a run: its recipe as JSON, their metrics, the settings for people, a sentence, and pictures."""

    recipe: str | None
    results: tuple[Result, ...]
    training: Mapping[str, Any]
    description: str
    pictures: Mapping[str, Path]


def weights_of_run(place: Path, best: bool) -> Path:
    """The file of weights that is meant: of the folder of a run its last or its best epoch, or the snapshot itself.

    Raises:
        CheckpointError: there is none.
    """
    if place.is_file():
        if best:
            raise CheckpointError(f"{place}: is a snapshot; --best chooses among the epochs of the folder of a run")
        return place
    names = (BEST_WEIGHTS, f"snapshots/{BEST}") if best else (WEIGHTS, f"snapshots/{BEST}")
    found = [place / name for name in names if (place / name).is_file()]
    if not found:
        raise CheckpointError(f"{place}: is not the folder of a run: it has neither {names[0]} nor {names[1]}")
    return found[0]


def facts_of_run(weights: Path, network: Pretrained) -> RunFacts:
    """What is known of the weights of a run.

    Args:
        weights: a file of `weights_of_run`.
        network: with these weights.

    Raises:
        RecipeError: recipe.json or metrics.json beside them cannot be read.
    """
    if weights.suffix == ".pt":
        state = read_snapshot(weights)
        rows = state["rows"]
        row = {name.removeprefix("val_"): value for name, value in (rows[-1] if rows else {}).items()}
        return _facts(recipe_from(state["recipe"], str(weights)), row, network, state.get("initial_weights"))
    folder = weights.parent
    metrics = RunMetrics(network.arch, {}, {})
    if (folder / "metrics.json").is_file():
        metrics = read_metrics(folder / "metrics.json")
    # recipe.json is that of the last start, which may not have ended.
    recipe = recipe_from(dict(metrics.recipe), str(folder / "metrics.json")) if metrics.recipe else None
    if recipe is None and (folder / "recipe.json").is_file():
        recipe = read_recipe(folder / "recipe.json")
    result = metrics.best if weights.name == BEST_WEIGHTS else metrics.result
    facts = _facts(recipe, result, network, metrics.initial_weights, metrics.images)
    # The matrix is that of model.safetensors.
    names = [name for name in PICTURES if name == CURVES or result == metrics.result]
    return replace(facts, pictures={name: folder / name for name in names if (folder / name).is_file()})


def _facts(
    recipe: Recipe | None,
    metrics: Mapping[str, Any],
    network: Pretrained,
    initial: str | None,
    images: int | None = None,
) -> RunFacts:
    names = ["top1", "miou"] + (["top5"] if network.options["num_classes"] >= FEWEST_FOR_TOP5 else [])
    figures = {name: metrics[name] for name in names if metrics.get(name) is not None}
    sizes = network.evaluation
    results: tuple[Result, ...] = ()
    if figures and network.task == "classification":
        results = (Result(str(sizes.crop), "held out", **figures, resize=sizes.resize, crop=sizes.crop),)
    elif figures:
        results = (Result(str(sizes.long_side), "held out", **figures),)
    training = _settings(recipe) if recipe else {}
    if images is not None:
        training["training images"] = images
    if "epoch" in metrics:
        training["epoch of these weights"] = metrics["epoch"]
    if initial is not None:
        training["initial weights"] = initial or "random"
    description = f"Fine-tuned from {initial}" if initial else ""
    known = records().get(initial or "")
    if known and known.license:
        description += f", whose licence is {known.license}"
    return RunFacts(recipe.to_json() if recipe else None, results, training, description, {})


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that a reader of the card looks for first."""
    optimizer, training = recipe.optimizer, recipe.training
    kind = optimizer.type if optimizer.type != "SGD" else f"SGD, momentum {optimizer.momentum:g}"
    regularisation = {"label smoothing": training.label_smoothing, "mixup": training.mixup, "cutmix": training.cutmix}
    return {
        "epochs": optimizer.schedule.epochs,
        "batch size": optimizer.batch_size,
        "optimizer": f"{kind}, weight decay {optimizer.weight_decay:g}",
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.schedule.type} schedule",
        **{name: f"{value:g}" for name, value in regularisation.items() if value},
        "training crop": f"{recipe.input.crop_train} pixels",
        "mixed precision": training.amp,
        "seed": training.seed,
    }
