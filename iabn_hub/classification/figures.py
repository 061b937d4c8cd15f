"""Misclassified images as figures of an HTML page."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..datasets.images import ImageError, open_rgb
from ..pages import picture, table
from ..terminal import printable
from .metrics import ConfidentError

THUMBNAIL = 160  # longer side, in pixels


def figures(
    errors: Iterable[ConfidentError], name_of: Callable[[int], str], classes: Sequence[str] | None = None
) -> str:
    """A heading and a figure for each error; nothing if there is none.

    Args:
        name_of: the path of an image of the dataset, or another name of it.
        classes: names for the labels.
    """
    parts = [_figure(error, name_of(error.index), classes) for error in errors]
    return "\n".join(["<h2>Most confident errors</h2>", *parts]) if parts else ""


def _figure(error: ConfidentError, name: str, classes: Sequence[str] | None) -> str:
    thumbnail = ""
    if os.path.isfile(name):  # not in an archive or a stream
        try:
            image = open_rgb(name)
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnail = picture(image)
        except ImageError:
            thumbnail = ""
    label, prediction = (classes[n] if classes else f"class {n}" for n in (error.label, error.prediction))
    rows = [("label", label), ("prediction", prediction), ("probability", error.probability)]
    file = html.escape(printable(Path(name).name))
    return f"<figure>{thumbnail}<figcaption>{file}{table((), rows)}</figcaption></figure>"
