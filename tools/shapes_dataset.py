#!/usr/bin/env python
"""Write images of coloured shapes with a class for every pixel: 200 to train on, 40 held out, of 128 × 128 pixels.

    python tools/shapes_dataset.py data/shapes

They are generated with a fixed seed: overlapping discs, squares and triangles in random shades, with noise.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
CLASSES = {"background": (110, 110, 110), "disc": (220, 60, 50), "square": (50, 190, 60), "triangle": (60, 80, 220)}
SHADE = 25  # how far a shape's colour may be from that of its class
GRAIN = 20  # how far a pixel's may be from that of its shape


def scene(random: np.random.RandomState, side: int = SIDE) -> tuple[Image.Image, Image.Image]:
    """An image and the class of each pixel."""
    colors = list(CLASSES.values())
    image = Image.new("RGB", (side, side), _near(random, colors[0], SHADE))
    label = Image.new("L", (side, side))
    for _ in range(random.randint(1, 4)):
        kind = random.randint(1, len(CLASSES))
        x, y = random.randint(0, side, 2)
        size = random.randint(side // 6, side // 3)
        for picture, fill in ((image, _near(random, colors[kind], SHADE)), (label, int(kind))):
            pen = ImageDraw.Draw(picture)
            if kind == 1:
                pen.ellipse((x - size, y - size, x + size, y + size), fill=fill)
            elif kind == 2:
                pen.rectangle((x - size, y - size, x + size, y + size), fill=fill)
            else:
                pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill=fill)
    grain = random.randint(-GRAIN, GRAIN + 1, (side, side, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)), label


def _near(random: np.random.RandomState, color: tuple[int, ...], shade: int) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(color + random.randint(-shade, shade + 1, 3), 0, 255))


def write(out: Path, train: int = 200, val: int = 40, side: int = SIDE, seed: int = 0) -> None:
    """The folder: train and val with images and labels, and classes.json."""
    random = np.random.RandomState(seed)
    for part, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (out / part / kind).mkdir(parents=True)
        for number in range(count):
            image, label = scene(random, side)
            image.save(out / part / "images" / f"{number:03d}.png")
            label.save(out / part / "labels" / f"{number:03d}.png")
    (out / "classes.json").write_text(json.dumps(list(CLASSES)) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make; must not exist yet")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already: name a new folder")
    write(arguments.out)
    print(f"{arguments.out}: 200 images in train, 40 in val; {', '.join(CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
