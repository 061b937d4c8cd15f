"""Images that people name: files, folders, patterns, URLs, and '-' for standard input."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from ..checkpoints.download import download
from ..checkpoints.errors import DownloadError
from ..checkpoints.fetch import offline
from ..terminal import progress_bar, without_secrets
from .images import ImageError, find_images, open_rgb

LARGEST = 100 << 20  # bytes of an image from a URL or from standard input
STDIN = "-"


def open_named(what: str) -> Iterator[tuple[str, Image.Image | ImageError]]:
    """The images behind a name, each with a name of its own: the image as `open_rgb` opens it, or why it cannot be.

    Args:
        what: a file; a folder, searched recursively; a glob pattern; an http(s):// URL; or '-', standard input.
    """
    if what == STDIN:
        yield "standard input", _tried(_from_stdin)
    elif what.startswith(("http://", "https://")):
        yield without_secrets(what), _tried(functools.partial(_from_url, what))
    else:
        try:
            files = find_images(what)
        except ImageError as e:
            yield what, e
            return
        for path, _ in files:
            yield str(path), _tried(functools.partial(open_rgb, path))


def _tried(make: Callable[[], Image.Image]) -> Image.Image | ImageError:
    try:
        return make()
    except ImageError as e:
        return e


def _from_stdin() -> Image.Image:
    content = sys.stdin.buffer.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ImageError(f"standard input: has more than {LARGEST:,} bytes")
    return open_rgb("standard input", io.BytesIO(content))


def _from_url(url: str) -> Image.Image:
    shown = without_secrets(url)
    if offline():
        raise ImageError(f"{shown}: downloads are off (IABN_HUB_OFFLINE or HF_HUB_OFFLINE)")
    with tempfile.TemporaryDirectory(prefix="iabn_hub-image-") as folder:
        path = Path(folder) / "image"
        try:
            with contextlib.closing(progress_bar(None, "image", unit="B", unit_scale=True, leave=False)) as bar:
                download(url, path, bar, LARGEST)
        except DownloadError as e:
            raise ImageError(f"{shown}: {e}") from e
        with path.open("rb") as file:
            return open_rgb(shown, file)
