"""Images that are decoded once: a memory-mapped file that all workers fill and read."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .folders import DataError

PREFIX = "iabn_hub-decoded-"


class DecodedImages:
    """The images of a data set as bytes, each written by whoever decodes it first.

    The file is in a temporary folder (`TMPDIR`), and deleted with this object. Its room is reserved at once: where the
    disk is full later, a write into the mapping would end the process.

    Args:
        files: of the images.
        shorter_side: they are resized to, before they are written; 0 or less: as they are.

    Raises:
        DataError: there is not enough free space; says how much is needed.
    """

    def __init__(self, files: list[str], shorter_side: int = 0) -> None:
        self.shorter_side = shorter_side
        free = shutil.disk_usage(tempfile.gettempdir()).free
        # Of a million images the sizes alone take minutes to read: first of a few from everywhere.
        some = files[:: max(1, len(files) // 1000)]
        for sample in (some, files) if len(some) < len(files) else (files,):
            sizes = [self._bytes_of(file) for file in sample]
            expected = sum(sizes) / max(1, len(sample)) * len(files)
            if expected > 0.9 * free:
                raise DataError(
                    f"decoded, the {len(files):,} images take about {expected / 1e9:.1f} GB, but "
                    f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB free: leave out --cache-images, or set TMPDIR "
                    "to a larger disk"
                )
        self.offsets = np.cumsum([0, *sizes])
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):  # of a process that was killed
            if not _is_running(left.name.removeprefix(PREFIX).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
        self.folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
        weakref.finalize(self, _delete, self.folder, os.getpid())
        for name, size in (("pixels", int(self.offsets[-1])), ("sizes", 8 * len(files))):
            with self._file(name).open("wb") as reserved:
                reserved.truncate(max(8, size))
                try:
                    if hasattr(os, "posix_fallocate"):  # not on macOS
                        os.posix_fallocate(reserved.fileno(), 0, max(8, size))
                except OSError as e:
                    raise DataError(
                        f"{self.folder}: {size:,} bytes for decoded images cannot be reserved ({e.strerror}): "
                        "leave out --cache-images, or set TMPDIR to a larger disk"
                    ) from e
        self._map()

    def get(self, index: int) -> Image.Image | None:
        """The image, or None if nobody has decoded it yet."""
        width, height = self.sizes[index]
        if width == 0:
            return None
        begin = self.offsets[index]
        return Image.fromarray(self.pixels[begin : begin + width * height * 3].reshape(height, width, 3))

    def put(self, index: int, image: Image.Image) -> Image.Image:
        """Keep an RGB image; returns it as `get` will."""
        if self.shorter_side > 0:
            image = image.resize(_resized(image.size, self.shorter_side), Image.Resampling.BILINEAR)
        width, height = image.size
        begin, end = self.offsets[index], self.offsets[index + 1]
        if width * height * 3 <= end - begin:  # else the file was replaced meanwhile
            self.pixels[begin : begin + width * height * 3] = np.asarray(image).reshape(-1)
            self.sizes[index, 1] = height
            self.sizes[index, 0] = width  # last: whoever sees it may read the pixels
        return image

    def _bytes_of(self, file: str) -> int:
        """What the image takes; 0 if it cannot be opened, which is said when it is read."""
        try:
            with Image.open(file) as image:
                size = image.size
        except Exception:  # as many kinds as there are formats
            return 0
        # Upright it may be the other way round, which rounds otherwise.
        sizes = [_resized(each, self.shorter_side) if self.shorter_side > 0 else each for each in (size, size[::-1])]
        return max(3 * width * height for width, height in sizes)

    def _file(self, name: str) -> Path:
        return Path(self.folder) / name

    def _map(self) -> None:
        self.pixels = np.memmap(self._file("pixels"), np.uint8, "r+")
        self.sizes = np.memmap(self._file("sizes"), np.int32, "r+").reshape(-1, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("pixels", "sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()


def _resized(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """As torchvision's Resize."""
    width, height = size
    short, long = min(size), max(size)
    scaled = shorter_side, math.trunc(shorter_side * long / short)
    return scaled if width <= height else scaled[::-1]


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # of another user
        return True
    return True


def _delete(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
