"""iabn-hub segment: a class for every pixel of photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..datasets.images import ImageError, find_images
from ..segmentation.fusion import FUSIONS
from ..segmentation.outputs import KINDS, check_names
from ..segmentation.predict import Views
from ..segmentation.segmenter import DEFAULT_MODEL, SegmentOptions, segment
from ..world import init_world
from .frame import (
    FAILED,
    OK,
    Numbers,
    Words,
    amp_option,
    complain,
    complete_names,
    device_option,
    json_option,
    options,
    print_json,
    usage_errors,
)

view_options: Callable[[Any], Any] = options(
    click.option(
        "--scales", type=Numbers(), default="1", show_default=True, help="Scales of the image, such as 0.7,1,1.2."
    ),
    click.option("--flip", is_flag=True, help="Also predict each scale flipped horizontally."),
    click.option(
        "--fusion", type=click.Choice(list(FUSIONS)), default="mean", show_default=True, help="Of scales and flips."
    ),
    click.option("--tile", type=int, metavar="PIXELS", help="Side of the largest part that the network sees at once."),
    click.option(
        "--long-side",
        type=click.IntRange(min=0),
        metavar="PIXELS",
        help="Longer side that the network is shown; 0 does not resize (default: as validated).",
    ),
)


def views_of(given: dict[str, Any]) -> Views:
    """The views that the options of `view_options` describe."""
    with usage_errors():
        return Views(given["scales"], given["flip"], given["fusion"], given["tile"])


@click.command("segment")
@click.argument("images", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--model",
    metavar="MODEL",
    default=DEFAULT_MODEL,
    show_default=True,
    shell_complete=complete_names,
    help="name, name.tag, hf-hub:ORG/NAME, the folder of a run, or a snapshot",
)
@click.option("--checkpoint", metavar="FILE", help="Load this file of weights instead of the published one.")
@click.option("--output", "kinds", type=Words(KINDS), default="palette", show_default=True,
              help=f"One or more of {', '.join(KINDS)}.")  # fmt: skip
@view_options
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Photos of one size at once."
)
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@amp_option
@device_option
@json_option
def command(images: str, out: Path, **given: Any) -> int:
    """Segment photos: by default, street scenes.

    IN is a file, a folder (searched recursively) or a pattern in quotes. OUT receives NAME.KIND.png for every KIND of
    --output, in the size of the photo: palette (the colours of the classes), raw (their numbers), prob (the probability
    of the class, 255 is 1), overlay (photo, colours and legend). Existing outputs are kept, so the same command
    continues where it was stopped. Under torchrun the ranks share the photos.

    Memory, besides the network's own: 2.5 float32 numbers per pixel and class with mean and voting; at 2048 × 1536 and
    65 classes 2 GB. --tile limits what the network sees at once.
    """
    views = views_of(given)
    try:
        files = find_images(images)
    except ImageError as e:
        raise click.UsageError(str(e)) from e
    with usage_errors():
        check_names(files)
    chosen = SegmentOptions(
        out, given["model"], given["checkpoint"], given["kinds"], views, given["long_side"], given["batch_size"],
        given["amp"], given["overwrite"],
    )  # fmt: skip
    with init_world(given["device"]) as world:
        rows = segment(files, chosen, world, complain)
        if world.is_primary:
            _print(rows, chosen, given["as_json"])
    return FAILED if any("error" in row for row in rows) else OK


def _print(rows: list[dict[str, Any]], chosen: SegmentOptions, as_json: bool) -> None:
    if as_json:
        views = chosen.views
        shown = {"scales": list(views.scales), "flip": views.flip, "fusion": views.fusion, "tile": views.tile}
        print_json({"model": chosen.model, "views": shown, "images": rows})
        return
    for row in rows:
        if row.get("kept"):
            print(f"{row['image']}: outputs exist already (--overwrite replaces them)")
        elif "classes" in row:
            shares = ", ".join(f"{name} {share:.1f} %" for name, share in list(row["classes"].items())[:5])
            print(f"{row['image']}: {shares}")
