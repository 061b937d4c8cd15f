"""Plots of the benchmarks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .step import WAYS, Way

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """A plot of each network of `measure_steps`, as NAME.svg and NAME.png in `folder`; returns their paths.

    Raises:
        ValueError: matplotlib is not installed; says how to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in result["networks"]:
        figure = step_figure(result, [name])
        for suffix in ("svg", "png"):
            written.append(folder / f"{name}.{suffix}")
            figure.savefig(written[-1], metadata={"Date": None} if suffix == "svg" else None)
    return written


def require_matplotlib() -> None:
    """Raise a ValueError that says how to install it, unless it is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs the package matplotlib: pip install 'iabn-hub[train]'")


def step_figure(result: dict[str, Any], names: list[str]) -> Figure:
    """Bytes kept against the time of a step, relative to the standard network, with Pareto fronts."""
    require_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, names):
        _draw_network(axis, name, result["networks"][name])
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("bytes kept / those of the standard network", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("time of a training step / its time", fontsize=9)
    handles = [_marker(way) for way in WAYS]
    labels = [f"{number}  {way.name}" for number, way in enumerate(WAYS, start=1)]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, 2 * columns - 1), fontsize=8, frameon=False)
    return figure


def _draw_network(axis: Axes, name: str, rows: dict[str, Any]) -> None:
    points = {way: (row["kept_ratio"], row["step_ratio"]) for way, row in rows.items() if "step_ratio" in row}
    best: list[tuple[float, float]] = []
    for kept, step in sorted(points.values()):
        if not best or step < best[-1][1]:
            best.append((kept, step))
    axis.step(*zip(*best), where="post", color="0.75", linewidth=1.5, zorder=1)
    for number, way in enumerate(WAYS, start=1):
        if way.name in points:
            kept, step = points[way.name]
            drawn = _marker(way)
            axis.plot(kept, step, marker=drawn.get_marker(), color=drawn.get_color(), linestyle="", zorder=2)
            axis.annotate(str(number), (kept, step), (5, 4), textcoords="offset points", fontsize=8)
    axis.set_title(name, fontsize=10)
    axis.margins(y=0.15)
    axis.set_xlim(0, 1.08 * max(1.0, *(kept for kept, _ in points.values())))
    axis.grid(alpha=0.3)


def _marker(way: Way) -> Line2D:
    """Colour by the network, shape by how it runs."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    colour = "#1f77b4" if way.inplace else "#2ca02c" if way.converted else "#d62728"
    marker = "s" if way.budget is not None else "^" if way.checkpointing else "o"
    return Line2D([], [], color=colour, marker=marker, linestyle="")
