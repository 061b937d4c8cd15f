"""Write predictions as images: palette, raw, prob and overlay."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import write_atomically
from .palette import Palette

KINDS = ("palette", "raw", "prob", "overlay")
STRENGTH = 0.55  # of the labels' colours in an overlay
BACKGROUND = {"background", "void", "unlabeled", "unlabelled", "ignore"}
OUTLINE = 800  # the longer side of a picture whose outlines are one pixel wide
# The legend: its font is a 36th of the height of the picture; it has room for these classes at least.
ROWS, SMALLEST_FONT, LINE, LEGEND = 36, 12, 1.4, 24


def output_paths(folder: Path, below: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Where each kind of output of an image lies: FOLDER/below/name.KIND.png."""
    return {kind: folder / below.with_name(f"{below.stem}.{kind}.png") for kind in kinds}


def check_names(files: Sequence[tuple[Path, Path]]) -> None:
    """Refuse images whose outputs would have the same name, since they differ in the suffix alone.

    Raises:
        ValueError: names both.
    """
    seen: dict[Path, Path] = {}
    for file, below in files:
        stem = below.with_suffix("")
        if stem in seen:
            raise ValueError(f"{file} and {seen[stem]} would be written under one name: rename one")
        seen[stem] = file


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    content = io.BytesIO()
    image.save(content, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def draw(kind: str, image: Image.Image, classes: np.ndarray, values: np.ndarray, palette: Palette) -> Image.Image:
    """One kind of output, of the size of the image.

    Args:
        image: RGB. classes: (H, W) uint8. values: (H, W) float32, the probability of the class, 0..1. Both may be of
            another size than the image; the nearest pixel counts.
    """
    if kind == "prob":
        return Image.fromarray((values * 255).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    labels = Image.fromarray(classes).resize(image.size, Image.Resampling.NEAREST)
    if kind == "raw":
        return labels
    colored = Image.frombytes("P", labels.size, labels.tobytes())
    colored.putpalette(palette.flat())
    return colored if kind == "palette" else _overlay(image, colored, palette)


def _overlay(image: Image.Image, labels: Image.Image, palette: Palette) -> Image.Image:
    """The image under its labels' colours, with outlines, and beside it the classes by their share.

    Classes of the background, such as 'void', are not painted.
    """
    numbers = np.asarray(labels)
    unpainted = [n for n, name in enumerate(palette.names) if name.lower() in BACKGROUND]
    photo = np.asarray(image)
    blended = np.asarray(Image.blend(image, labels.convert("RGB"), STRENGTH)).copy()
    hidden = np.isin(numbers, unpainted)
    blended[hidden] = photo[hidden]
    blended[_outlines(numbers, max(1, max(image.size) // OUTLINE))] = 255
    counts = np.bincount(numbers.ravel(), minlength=len(palette.names))
    present = [int(number) for number in counts.argsort(kind="stable")[::-1] if counts[number]]
    size = max(SMALLEST_FONT, image.height // ROWS)
    shown = present[: max(LEGEND, round(image.height / (LINE * size)) - 2)]
    lines = [f"{palette.names[n]}  {100 * counts[n] / counts.sum():.1f} %" for n in shown]
    lines += [f"and {len(present) - len(shown)} more"] if len(present) > len(shown) else []
    font = ImageFont.load_default(size)
    width = round(max(font.getlength(line) for line in lines)) + 3 * size
    height = max(image.height, round((len(lines) + 1) * LINE * size))
    sheet = Image.new("RGB", (image.width + width, height), "white")
    sheet.paste(Image.fromarray(blended), (0, 0))
    pen = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        left, top = image.width + size // 2, round((row + 0.5) * LINE * size)
        if row < len(shown):
            color = "white" if shown[row] in unpainted else palette.colors[shown[row]]
            pen.rectangle((left, top, left + size, top + size), fill=color, outline="black", width=max(1, size // 16))
        pen.text((left + 1.5 * size, top), line, fill="black", font=font)
    return sheet


def _outlines(numbers: np.ndarray, width: int) -> np.ndarray:
    """Where the class changes within `width` pixels to the right or below, (H, W) bool."""
    edges = np.zeros(numbers.shape, bool)
    edges[:-width] |= numbers[:-width] != numbers[width:]
    edges[:, :-width] |= numbers[:, :-width] != numbers[:, width:]
    return edges
