"""report.html of a run: its curves, settings and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..pages import embed, page, table

CURVES = (  # a report shows those that its run has
    ("loss", ("loss", "val_loss")),
    ("top-1, %", ("top1", "val_top1")),
    ("top-5, %", ("top5", "val_top5")),
    ("mIoU, %", ("val_miou",)),
    ("pixel accuracy, %", ("pixel_accuracy", "val_pixel_accuracy")),
    ("learning rate", ("learning_rate",)),
    ("images a second", ("images_per_second",)),
    ("waiting for images, %", ("waited",)),
)


def training_report(title: str, rows: Sequence[Mapping[str, float]], facts: Mapping[str, Any]) -> str:
    """The curves of a run over its epochs, its settings and results, and its last epochs."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    columns = list(rows[-1]) if rows else []
    curves = [(name, [key for key in keys if key in columns]) for name, keys in CURVES]
    for axes, (name, keys) in zip(figure.subplots(2, 3).flat, [curve for curve in curves if curve[1]]):
        for key in keys:
            axes.plot(epochs, [row[key] for row in rows], marker="." if len(rows) < 40 else "", label=key)
        axes.set_title(name, loc="left")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend()
    return page(
        title,
        table(("", ""), facts.items()),
        embed(lambda file: figure.savefig(file, format="png", dpi=110)),
        "<h2>The last epochs</h2>",
        table(columns, ([row[key] for key in columns] for row in rows[-20:])),
    )
