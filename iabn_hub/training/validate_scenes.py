"""`tools/validate.py` for segmentation networks: intersection over union of each class."""

from __future__ import annotations

import argparse
import dataclasses
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.export import write_atomically
from ..processes import Processes
from ..segmentation.command import views_of
from ..segmentation.predict import Views
from .data import val_loader
from .report import page, picture, table
from .scenes import SceneSamples, WholeScenes, open_scenes
from .score_scenes import SceneScore, evaluate_scenes
from .sources import Source
from .splits import DataError
from .transforms import Normalize

OF_CLASSIFIERS = ("crop", "scale", "ten_crop", "dataset", "samples", "download")


def validate_scenes(arguments: argparse.Namespace, source: Source, everyone: Processes) -> int:
    """Measure, print, write, check; returns the exit code.

    Raises:
        DataError, ValueError: the data or the arguments do not fit the network.
    """
    for name in OF_CLASSIFIERS:
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is for classifiers, {source.text} is for segmentation")
    views = views_of(arguments)
    longest = source.longest if arguments.longest is None else arguments.longest
    listed = _listed(source, views, longest) if arguments.check else None
    if arguments.report:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
    count = source.options["num_classes"]
    ignore = source.ignore if arguments.ignore is None else arguments.ignore
    scenes = open_scenes(Path(arguments.data), arguments.split, count, ignore)
    if scenes.classes and len(scenes.classes) != count:
        raise DataError(f"{arguments.data} has {len(scenes.classes)} classes, {source.text} tells {count} apart")
    if scenes.classes and source.record is None and source.classes not in (None, scenes.classes):
        raise DataError(f"{arguments.data} has the classes {', '.join(scenes.classes[:5])} …, {source.text} others")
    classes = source.classes or scenes.classes or tuple(f"class {number}" for number in range(count))
    loader = val_loader(scenes, WholeScenes(longest), 1, arguments.workers, everyone, SceneSamples)
    score = evaluate_scenes(
        source.model.to(everyone.device), loader, Normalize(source.input).to(everyone.device), everyone,
        classes=classes, views=views, amp=arguments.amp, channels_last=arguments.channels_last, text="validation",
    )  # fmt: skip
    if score.images == 0:
        raise DataError(f"{arguments.data}: none of its images can be read; the first: {score.broken[0]}")
    if not score.confusion.any():
        raise DataError(f"{arguments.data}: in {arguments.split}, no pixel counts: are there labels? See --ignore")
    facts = _facts(source, views, longest, score, classes, everyone)
    if listed:
        facts["check"] = {**listed, "difference": score.miou - listed["miou"], "tolerance": arguments.tolerance}
        facts["check"]["passed"] = abs(facts["check"]["difference"]) <= arguments.tolerance + 1e-9
    if everyone.first:
        _print(facts, arguments.json)
        if arguments.report:
            write_atomically(arguments.report, _report(facts, score).encode())
    return int(bool(listed) and not facts["check"]["passed"])


def protocol_of(views: Views, longest: int) -> str:
    """The name of a protocol in the catalogue: '2048_flip', '2048_0.7_1_1.2'."""
    scales = [] if tuple(views.scales) == (1.0,) else [f"{scale:g}" for scale in views.scales]
    return "_".join([str(longest), *scales, *(["flip"] if views.flip else [])])


def _listed(source: Source, views: Views, longest: int) -> dict[str, Any]:
    if source.record is None:
        raise ValueError("--check compares with the catalogue, so MODEL must be a name from 'iabn-hub list'")
    if views.fusion != "mean" or views.tile is not None:
        raise ValueError("--check compares with the catalogue's figures, which are without --fusion and --tile")
    wanted = protocol_of(views, longest)
    result = source.record.result(wanted)
    if result is None or result.miou is None:
        there = ", ".join(each.protocol for each in source.record.results if each.miou is not None)
        raise ValueError(
            f"the catalogue has no figure of {source.record.name} for the protocol {wanted}; there are: {there}"
        )
    return {"protocol": wanted, "dataset": result.dataset, "miou": result.miou}


def _facts(
    source: Source, views: Views, longest: int, score: SceneScore, classes: tuple[str, ...], everyone: Processes
) -> dict[str, Any]:
    pixels = score.confusion.sum(1).tolist()
    per_class = [
        {"class": number, "label": name, "pixels": pixels[number], "iou": iou}
        for number, (name, iou) in enumerate(zip(classes, score.iou.tolist()))
        if not math.isnan(iou)
    ]
    return {
        "model": source.text,
        "network": source.arch,
        "changes": source.changes,
        "protocol": {"longest": longest, **dataclasses.asdict(views)},
        "images": score.images,
        "miou": score.miou,
        "accuracy": score.accuracy,
        "images_per_second": score.images / score.seconds,
        "device": str(everyone.device),
        "processes": everyone.count,
        "per_class": per_class,
        "skipped": score.broken,
    }


def print_head(facts: dict[str, Any], as_json: bool) -> bool:
    """Print the facts of a validation as JSON, or what stands above its table; returns whether all is said."""
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return True
    for line in (*facts["changes"], *(f"skipped: {reason}" for reason in facts["skipped"])):
        print(line)
    return False


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if print_head(facts, as_json):
        return
    print(f"{'class':<30} {'pixels':>15} {'IoU':>8}")
    for row in facts["per_class"]:
        print(f"{row['label'][:30]:<30} {row['pixels']:>15,} {row['iou']:>7.2f}%")
    protocol = facts["protocol"]
    size = f"longer side {protocol['longest']}" if protocol["longest"] else "as they are"
    print(
        f"{facts['model']}: mIoU {facts['miou']:.2f} % of {len(facts['per_class'])} classes, pixels right "
        f"{facts['accuracy']:.2f} % on {facts['images']:,} images ({size}, scales "
        f"{', '.join(f'{scale:g}' for scale in protocol['scales'])}{', mirrored too' if protocol['flip'] else ''}); "
        f"{facts['images_per_second']:.2f} images/s on {facts['processes']} × {facts['device']}"
    )
    if "check" in facts:
        check = facts["check"]
        print(
            f"check {'passed' if check['passed'] else 'FAILED'}: the catalogue says mIoU {check['miou']:.2f} "
            f"({check['difference']:+.2f}) on {check['dataset']}; tolerance {check['tolerance']:g}"
        )


def _report(facts: dict[str, Any], score: SceneScore) -> str:
    names = ("network", "images", "miou", "accuracy", "images_per_second", "processes", "device")
    rows = sorted(facts["per_class"], key=lambda row: row["iou"])
    return page(
        f"Validation of {facts['model']}",
        table(("", ""), [*((name, facts[name]) for name in names), *facts["protocol"].items()]),
        "".join(f"<p>{html.escape(change)}</p>" for change in facts["changes"]),
        "<h2>Classes, the worst first</h2>",
        table(("class", "pixels", "IoU, %"), [(row["label"], row["pixels"], row["iou"]) for row in rows]),
        "<h2>Image, truth, guess</h2>",
        *(f"<p>{picture(Image.fromarray(np.asarray(shown)))}</p>" for shown in score.shown()),
    )
