"""metrics.json of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..schema import Integer, load_json, parse, record_class
from .schema import RecipeError

FEWEST_FOR_TOP5 = 6  # classes; among five every answer is right


@record_class
class RunMetrics:
    """What a run ended with.

    `result` holds the metrics of model.safetensors and `best` those of best.safetensors, each with its `epoch`;
    `epochs` has a row for each epoch, as metrics.csv. `images` is the number of training images, `skipped` of those
    that could not be read, `initial_weights` a name ('' for random ones), and `seconds` the time of all starts. None
    where an earlier version did not note it. `data` is the digest of the validation images, see
    `iabn_hub.datasets.digest`; `command`, `ranks` and `versions` are those of the last start.
    """

    model: str
    result: Mapping[str, Any]
    best: Mapping[str, Any]
    classes: tuple[str, ...] | None = None
    epochs: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0
    images: Integer | None = None
    skipped: Integer = 0
    initial_weights: str | None = None
    recipe: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    command: str | None = None
    ranks: Integer | None = None
    versions: Mapping[str, str] | None = None


def read_metrics(path: Path) -> RunMetrics:
    """The metrics.json of a run.

    Raises:
        RecipeError: it cannot be read, or is none; names the file and the field.
    """
    return parse(RunMetrics, load_json(path, RecipeError), lambda text: RecipeError(f"{path}: {text}"))
