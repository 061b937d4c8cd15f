"""Names and colours of classes."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Color = tuple[int, int, int]
VISTAS_CLASSES = Path(__file__).parent.parent / "data" / "vistas_classes.json"
VISTAS = "mapillary-vistas-1.2"
GOLDEN = 0.618034  # of a turn between neighbouring hues, so that few classes lie far apart


@dataclass(frozen=True)
class Palette:
    """The classes in the order of their numbers, at most 256."""

    names: tuple[str, ...]
    colors: tuple[Color, ...]

    def flat(self) -> list[int]:
        """As Pillow takes it: red, green and blue of class 0, of class 1, …"""
        return [value for color in self.colors for value in color]


def vistas() -> Palette:
    """The 65 classes of Mapillary Vistas 1.2."""
    rows = json.loads(VISTAS_CLASSES.read_text())
    return Palette(tuple(row["name"] for row in rows), tuple(tuple(row["color"]) for row in rows))


def palette_of(num_classes: int, names: Sequence[str] | None = None) -> Palette:
    """The colours that belong to these names where a dataset has its own, else hues that differ."""
    if names is not None and tuple(names) == (known := vistas()).names:
        return known
    colors = []
    for number in range(num_classes):
        light = (1.0, 0.75, 0.5)[number // 12 % 3]
        red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.8, light)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return Palette(tuple(names or (f"class {i}" for i in range(num_classes))), tuple(colors))
