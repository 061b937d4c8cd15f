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
LEGEND = 24  # classes that a legend has room for


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
    """The image under its labels' colours, and beside it the classes by their share."""
    blended = Image.blend(image, labels.convert("RGB"), STRENGTH)
    counts = np.bincount(np.asarray(labels).ravel(), minlength=len(palette.names))
    present = [int(number) for number in counts.argsort(kind="stable")[::-1] if counts[number]][:LEGEND]
    size = max(10, min(24, image.height // (LEGEND + 2)))
    font = ImageFont.load_default(size)
    lines = [f"{palette.names[n]}  {100 * counts[n] / counts.sum():.1f} %" for n in present]
    width = round(max(font.getlength(line) for line in lines)) + 3 * size
    height = max(image.height, round((len(lines) + 1) * 1.4 * size))
    sheet = Image.new("RGB", (image.width + width, height), "white")
    sheet.paste(blended, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for row, (number, line) in enumerate(zip(present, lines)):
        left, top = image.width + size // 2, round((row + 0.5) * 1.4 * size)
        pen.rectangle((left, top, left + size, top + size), fill=palette.colors[number], outline="black")
        pen.text((left + 1.5 * size, top), line, fill="black", font=font)
    return sheet
