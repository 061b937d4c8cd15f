"""Open images as people hand them over: rotated by EXIF, grey, with alpha, CMYK or 16 bits deep."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS


class ImageError(ValueError):
    """A file is not there, or is not a picture that can be read."""


def open_rgb(path: str | os.PathLike[str], file: IO[bytes] | None = None) -> Image.Image:
    """The whole picture as RGB, upright, 8 bits a channel; transparency becomes white.

    Args:
        path: the picture, or only its name for messages if it is read from `file`.

    Raises:
        ImageError: missing, not an image, or damaged; names the file.
    """
    if file is None and os.path.isdir(path):
        raise ImageError(f"{path}: is a folder, not an image")
    try:
        with warnings.catch_warnings(), Image.open(file or path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a phone's 108 megapixels are welcome
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as e:
        raise ImageError(f"{path}: there is no such file") from e
    except UnidentifiedImageError as e:
        raise ImageError(f"{path}: is not an image in a format that can be read") from e
    except Image.DecompressionBombError as e:
        raise ImageError(f"{path}: has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels") from e
    except Exception as e:  # a damaged picture fails in as many ways as there are decoders
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        raise ImageError(f"{path}: cannot be read as an image: {reason}") from e


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits in 16 or 32; Pillow's own conversion would clip at 255
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    elif image.mode == "F":  # light from 0 to 1, or already to 255
        brightest = image.getextrema()[1]
        scale = 255 if isinstance(brightest, float) and brightest <= 1 else 1
        image = image.point(lambda value: value * scale).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def find_images(what: str) -> list[tuple[Path, Path]]:
    """The image files behind a name, each with its path relative to what was named.

    Args:
        what: a file; a folder, searched recursively; or a glob pattern.

    Raises:
        ImageError: nothing is there.
    """
    path = Path(what).expanduser()
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMG_EXTENSIONS)
        files = [(each, each.relative_to(path)) for each in found]
    elif path.exists():
        files = [(path, Path(path.name))]
    else:
        anchor = Path(path.anchor or ".")
        files = [(each, Path(each.name)) for each in sorted(anchor.glob(os.fspath(path.relative_to(path.anchor))))]
    if not files:
        raise ImageError(f"{what}: there is no such file, and no image in a folder or matching a pattern of this name")
    return files
