"""Pages that show a run or a validation: one HTML file each, pictures and all."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left } img { max-width: 100% }
figure { display: inline-block; width: 9rem; margin: .4rem; vertical-align: top; font-size: 13px }
figure img { width: 100% }
"""


def page(title: str, *parts: str) -> str:
    """An HTML page of these parts."""
    body = "\n".join(parts)
    return (
        f"<!DOCTYPE html>\n<html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{body}\n</html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; floats get two digits behind the point, or four that count."""

    def cell(kind: str, value: Any) -> str:
        text = str(value)
        if isinstance(value, float):
            text = f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"
        elif isinstance(value, int):
            text = f"{value:,}"
        return f"<{kind}>{html.escape(text)}</{kind}>"

    lines = ["".join(cell("th", name) for name in header)]
    lines += ["".join(cell("td", value) for value in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(image: Image.Image) -> str:
    """An <img> that holds its picture."""
    return _embed(lambda file: image.save(file, "PNG"))


def _embed(save: Callable[[io.BytesIO], None]) -> str:
    file = io.BytesIO()
    save(file)
    return f"<img src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}' alt=''>"


CURVES = (  # those that a run has
    ("loss", ("loss", "val_loss")),
    ("top-1, %", ("top1", "val_top1")),
    ("top-5, %", ("top5", "val_top5")),
    ("mIoU, %", ("val_miou",)),
    ("pixels right, %", ("accuracy", "val_accuracy")),
    ("learning rate", ("learning_rate",)),
    ("images a second", ("images_per_second",)),
    ("waiting for images, %", ("waited",)),
)


def training_report(title: str, rows: Sequence[Mapping[str, float]], facts: Mapping[str, Any]) -> str:
    """The curves of a run over its epochs, its facts, and its last rows."""
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
        _embed(lambda file: figure.savefig(file, format="png", dpi=110)),
        "<h2>The last epochs</h2>",
        table(columns, ([row[key] for key in columns] for row in rows[-20:])),
    )
