"""What a complete run writes: weights of its last and of its best epoch, their configuration, metrics, a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..checkpoints.errors import CheckpointError
from ..checkpoints.weights import BEST, BEST_WEIGHTS, WEIGHTS, read_snapshot, save_safetensors
from ..files import write_atomically
from ..models.timm_config import config_text
from ..recipes.metrics import RunMetrics
from ..schema import to_dict
from .logging import Row, RunLogger
from .report import report_figures
from .task import TITLES, format_metrics
from .trainer import Trainer

RESULTS = (WEIGHTS, BEST_WEIGHTS, "config.json", "metrics.json", "report.html", "curves.png", "confusion.png")


def write_results(
    trainer: Trainer,
    out: Path,
    log: RunLogger,
    seconds: float,
    skipped: int,
    best_only: bool,
    origin: Mapping[str, Any],
) -> None:
    """Write the results of a run into `out`.

    Args:
        seconds: of all starts of the run.
        skipped: images that could not be read.
        best_only: the weights of the best epoch are model.safetensors, and those of the last are not written.
        origin: `data`, `command`, `ranks` and `versions` of `RunMetrics`.
    """
    run = trainer.run
    monitor = f"val_{run.task.monitors[0]}"
    best_row = max(trainer.rows, key=lambda row: row[monitor])
    last = _metrics(trainer.rows[-1]) | trainer.details
    best, best_state = last, trainer.evaluated.state_dict()
    if best_row is not trainer.rows[-1]:
        try:
            snapshot = _snapshot_of(best_row, run.snapshots.folder / BEST)
            best = _metrics(best_row) | snapshot.get("details", {})
            best_state = snapshot["ema"] or snapshot["model"]
        except CheckpointError as e:
            log.info(f"the last epoch counts as the best: {e}")
    weights = out / WEIGHTS
    if best_only:
        _save(trainer, best_state, weights)
        (out / BEST_WEIGHTS).unlink(missing_ok=True)  # of an earlier start
    else:
        _save(trainer, trainer.evaluated.state_dict(), weights)
        _save(trainer, best_state, out / BEST_WEIGHTS)
    write_atomically(out / "config.json", config_text(run.config))
    result = best if best_only else last
    epochs = tuple({name: _finite(value) for name, value in row.items()} for row in trainer.rows)
    metrics = RunMetrics(
        run.recipe.model, result, best, run.task.classes, epochs, round(seconds, 1), run.loader.images, skipped,
        trainer.initial_weights, run.recipe.to_dict(), **origin,
    )  # fmt: skip
    facts = {
        **{TITLES[name]: f"{result[name]:.2f} %" for name in run.task.monitors},
        "best epoch": f"{best['epoch']}, {best[run.task.monitors[0]]:.2f} %", "images": f"{run.loader.images:,}",
        "unreadable images": skipped,
        **({} if trainer.initial_weights is None else {"initial weights": trainer.initial_weights or "random"}),
        "normalisation": run.recipe.norms, "device": str(run.world.device), "ranks": run.world.size,
        "time": f"{seconds / 60:.1f} minutes", "peak memory": f"{log.peak_memory() / 1e6:,.0f} MB",
        "weights": f"{weights.stat().st_size / 1e6:,.1f} MB",
    }  # fmt: skip
    figures = report_figures(trainer.rows, result, run.task.classes)
    for name, png in figures.items():
        write_atomically(out / name, png)
    log.report(run.recipe.model, trainer.rows, facts, figures, run.task.error_pictures(result))
    # The last: with it, the run is complete.
    write_atomically(out / "metrics.json", (json.dumps(to_dict(metrics), indent=1) + "\n").encode())
    if skipped:
        log.info(f"{skipped} images could not be read; train.log names them")
    summary = format_metrics(result, run.task.monitors[:1])
    log.info(f"{weights}  {weights.stat().st_size:,} bytes  {summary}  {out / 'report.html'}")


def _snapshot_of(row: Row, path: Path) -> dict[str, Any]:
    snapshot = read_snapshot(path)
    if not snapshot["rows"] or snapshot["rows"][-1]["epoch"] != row["epoch"]:
        raise CheckpointError(f"{path} is not of epoch {row['epoch']}, which was the best")
    return snapshot


def _save(trainer: Trainer, state: Mapping[str, Tensor], path: Path) -> None:
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_safetensors(plain, path, {"arch": trainer.run.recipe.model, "iabn_hub": __version__})


def _metrics(row: Row) -> dict[str, Any]:
    """The validation metrics of an epoch, and its number."""
    return {"epoch": row["epoch"]} | {
        name.removeprefix("val_"): _finite(value) for name, value in row.items() if name.startswith("val_")
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
