"""The files that a prediction becomes: palette, raw, prob, overlay."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..checkpoints.export import write_atomically
from .palette import Palette

KINDS = ("palette", "raw", "prob", "overlay")
STRENGTH = 0.55  # of the labels' colours in an overlay
LEGEND = 24  # classes that a legend has room for


def find_images(what: str) -> list[tuple[Path, Path]]:
    """Image files, each with the path that it has below what was named: a file, a folder and all below it, a glob.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: two files differ in their suffix alone, so that their outputs would have one name.
    """
    path = Path(what).expanduser()
    if path.is_dir():
        files = [
            (each, each.relative_to(path)) for each in sorted(path.rglob("*")) if each.suffix.lower() in IMG_EXTENSIONS
        ]
    elif path.exists():
        files = [(path, Path(path.name))]
    else:
        anchor = Path(path.anchor or ".")
        files = [(each, Path(each.name)) for each in sorted(anchor.glob(os.fspath(path.relative_to(path.anchor))))]
    if not files:
        raise FileNotFoundError(f"{what}: there is no such file, and no image in a folder or behind a pattern of it")
    seen: dict[Path, Path] = {}
    for file, below in files:
        if below.with_suffix("") in seen:
            raise ValueError(f"{file} and {seen[below.with_suffix('')]} would be written under one name: rename one")
        seen[below.with_suffix("")] = file
    return files


def resized(photo: Image.Image, longest: int) -> Image.Image:
    """The photo with its longer side `longest` pixels long; 0: as it is."""
    if longest == 0 or max(photo.size) == longest:
        return photo
    scale = longest / max(photo.size)
    width, height = (max(1, int(side * scale)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.BILINEAR)


def output_paths(folder: Path, below: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Where each kind of output of an image lies: FOLDER/below/name.KIND.png."""
    return {kind: folder / below.with_name(f"{below.stem}.{kind}.png") for kind in kinds}


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG that is whole or not there."""
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
