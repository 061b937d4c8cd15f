"""report.html of a run: its settings and results, its curves, the confusion matrix, and the worst errors."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
HEADINGS = {"curves.png": "", "confusion.png": "<h2>Confusion matrix</h2>"}
SPIKE = 10  # times the median; a loss that exceeds it is shown on a logarithmic scale
LETTERS_SHOWN = 0x530  # Latin, Greek and Cyrillic
MOST_WITH_COUNTS = 20  # classes of a matrix whose cells show their counts
LEFT_OUT = ("step", "waited", "peak_memory")  # of the table; metrics.csv has them


def training_report(
    title: str,
    rows: Sequence[Mapping[str, float]],
    facts: Mapping[str, Any],
    figures: Mapping[str, bytes],
    errors: str,
) -> str:
    """The page of a run.

    Args:
        rows: the epochs.
        facts: settings and results, by name.
        figures: of `report_figures`.
        errors: HTML of the worst errors.
    """
    columns = [name for name in rows[-1] if name not in LEFT_OUT] if rows else []
    return page(
        title,
        table(("", ""), facts.items()),
        *(HEADINGS[name] + embed(png) for name, png in figures.items()),
        errors,
        "<h2>The last epochs</h2>",
        table([name.replace("_", " ") for name in columns], ([row[key] for key in columns] for row in rows[-20:])),
    )


def report_figures(
    rows: Sequence[Mapping[str, float]], details: Mapping[str, Any], classes: Sequence[str] | None
) -> dict[str, bytes]:
    """The pictures of a report as PNG: curves.png, and confusion.png where the metrics have a confusion matrix."""
    figures = {"curves.png": _curves(rows)}
    confusion = details.get("confusion")
    if confusion:
        figures["confusion.png"] = _matrix(confusion, classes)
    return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    figure = Figure(figsize=(11, 6), layout="constrained")
    columns = list(rows[-1]) if rows else []
    curves = [(name, [key for key in keys if key in columns]) for name, keys in CURVES]
    curves = [curve for curve in curves if curve[1]]
    for axes, (name, keys) in zip(figure.subplots(2, 3).flat, curves):
        _curve(axes, rows, keys)
        axes.set_title(name, loc="left")
    for axes in figure.axes[len(curves) :]:
        axes.set_axis_off()
    return figure


def _curve(axes: Axes, rows: Sequence[Mapping[str, float]], keys: Sequence[str]) -> None:
    epochs = [row["epoch"] for row in rows]
    for key in keys:
        axes.plot(epochs, [row[key] for row in rows], marker="." if len(rows) < 40 else "", label=key)
    values = [row[key] for row in rows for key in keys]
    if "loss" in keys and min(values) > 0 and max(values) > SPIKE * statistics.median(values):
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(keys) > 1:
        axes.legend()


def _label(name: str, index: int) -> str:
    """The name of a class, or its number where the font of the pictures lacks its letters."""
    return name[:24] if all(ord(letter) < LETTERS_SHOWN for letter in name) else f"class {index}"


def _matrix(counts: Sequence[Sequence[int]], classes: Sequence[str] | None) -> Figure:
    """The confusion matrix: each row is the share of the images of a label."""
    number = len(counts)
    names = [_label(name, index) for index, name in enumerate(classes or map(str, range(number)))]
    figure = Figure(figsize=(min(4 + 0.35 * number, 11), min(3 + 0.35 * number, 11)), layout="constrained")
    axes = figure.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(number), names, rotation=90)
    axes.set_yticks(range(number), names)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a class may be called '$5 to $9'
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if number <= MOST_WITH_COUNTS:
        for y, row in enumerate(counts):
            for x, count in enumerate(row):
                if count:
                    axes.text(
                        x, y, str(count), ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black"
                    )
    return figure
