"""iabn-hub classify: the most probable classes of images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..classification.predict import DEFAULT_MODEL, SAMPLES, Classifier
from ..datasets.images import ImageError, find_images
from ..world import usable_device
from .frame import FAILED, OK, complain, complete_names, device_option, json_option, print_json


@click.command("classify")
@click.argument("images", metavar="[IMAGE]…", nargs=-1)
@click.option(
    "--model",
    metavar="MODEL",
    shell_complete=complete_names,
    help="name, name.tag, hf-hub:ORG/NAME, the folder of a run, or a snapshot (default: the bundled test network, "
    "which reads digits)",
)
@click.option("--checkpoint", metavar="FILE", help="Load this file of weights instead of the published one.")
@click.option("--topk", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to show.")
@device_option
@json_option
def command(images: tuple[str, ...], model: str | None, checkpoint: str | None, **options: Any) -> int:
    """Show the most probable classes of images.

    IMAGE is a file, a folder (searched recursively) or a pattern in quotes; by default the bundled samples.
    """
    if not images and (model or checkpoint is not None):
        raise click.UsageError("name at least one image, or leave --model out for the bundled samples")
    device = usable_device(options["device"])
    classifier = Classifier(model or DEFAULT_MODEL, checkpoint=checkpoint, device=device)
    as_json, rows = options["as_json"], list[dict[str, Any]]()
    if not as_json:
        print(f"model: {classifier.name}")
    for image in images or sorted(map(str, SAMPLES.glob("*.png"))):
        for path in _files(image, rows):
            try:
                predictions = classifier.classify(path, options["topk"])
            except ImageError as e:
                _failed(path, e, rows)
                continue
            rows.append({"image": str(path), "predictions": [asdict(each) for each in predictions]})
            if not as_json:
                print(path)
                for each in predictions:
                    print(f"  {100 * each.probability:6.2f} %  {each.label}")
    if as_json:
        print_json({"model": classifier.name, "images": rows})
    return FAILED if any("error" in row for row in rows) else OK


def _files(image: str, rows: list[dict[str, Any]]) -> list[Path]:
    try:
        return [path for path, _ in find_images(image)]
    except ImageError as e:
        _failed(image, e, rows)
        return []


def _failed(image: Any, error: ImageError, rows: list[dict[str, Any]]) -> None:
    rows.append({"image": str(image), "error": str(error)})
    complain(error)
