"""The command that turns photos into maps of classes: `iabn-hub segment IN OUT`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

from ..checkpoints.errors import UnknownNameError
from ..commands import FAILED, OK, USAGE, complain
from ..images import ImageError, open_rgb
from ..models import MODELS
from ..processes import Processes, autocast, processes
from ..training.sources import load_source
from .fusion import FUSIONS
from .palette import Palette, palette_of
from .pictures import KINDS, draw, find_images, output_paths, resized, save
from .predict import Views, predict

PROGRAM = "segment"
DEFAULT_MODEL = "wider_resnet38_deeplab3_iabn.vistas"
DESCRIPTION = """Say what is where in photos: streets, by default.

IN is a file, a folder (with all below it) or a pattern in quotes. OUT receives NAME.KIND.png for every KIND of
--output, of the size of the photo: palette (in the classes' colours), raw (the numbers of the classes), prob (the
probability of the class, 255 is 1), overlay (photo, colours and legend). Outputs that are there already are
kept, so that the same command goes on where it was stopped. Under torchrun (tools/segment.py) the processes share the
photos.

Memory, beside the network's own: 2.5 float32 numbers per pixel and class with mean and voting; at 2048 × 1536 and 65
classes 2 GB. --tile limits what the network sees at a time."""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    p.add_argument("input", metavar="IN", help="file, folder or 'pattern'")
    p.add_argument("out", metavar="OUT", type=Path, help="folder for the results; made if missing")
    p.add_argument("--model", metavar="NAME[.TAG]", default=DEFAULT_MODEL,
                   help=f"or a run's folder, or hf-hub:ORG/NAME (default: {DEFAULT_MODEL})")  # fmt: skip
    p.add_argument("--checkpoint", metavar="FILE", help="load this file of weights instead of fetching")
    p.add_argument("--output", dest="kinds", type=_words(KINDS), default=("palette",), metavar="KIND,…",
                   help=f"one or more of {', '.join(KINDS)} (default: palette)")  # fmt: skip
    add_views(p)
    p.add_argument("--batch-size", type=int, default=1, help="photos of one size at once (default: 1)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    p.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    p.add_argument("--overwrite", action="store_true", help="make outputs anew that are there already")


def add_views(p: Any) -> None:
    """The arguments of `views_of`, and --longest."""
    p.add_argument("--scales", type=_numbers, default=(1.0,), metavar="X,…", help="such as 0.7,1,1.2 (default: 1)")
    p.add_argument("--flip", action="store_true", help="look at each mirrored as well")
    p.add_argument("--fusion", choices=tuple(FUSIONS), default="mean", help="of scales and mirrors (default: mean)")
    p.add_argument("--longest", type=int, metavar="PIXELS",
                   help="longer side that the network is shown; 0: as it is (default: as validated)")  # fmt: skip
    p.add_argument("--tile", type=int, metavar="PIXELS", help="side of the largest piece (default: all at once)")


def views_of(arguments: argparse.Namespace) -> Views:
    """How the arguments want images to be looked at.

    Raises:
        ValueError: they make no sense.
    """
    if arguments.longest is not None and arguments.longest < 0:
        raise ValueError("--longest must be 0 or more")
    return Views(arguments.scales, arguments.flip, arguments.fusion, arguments.tile)


def _words(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(text.split(",")))
        wrong = [word for word in words if word not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return words

    return parse


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.7,1,1.2") from e


def run(arguments: argparse.Namespace) -> int:
    """Segment what the arguments name; returns the exit code: 1 if a photo failed, 2 for wrong usage.

    Raises:
        UnknownNameError, CheckpointError: the network cannot be had.
    """
    try:
        views = views_of(arguments)
        files = find_images(arguments.input)
        if arguments.batch_size < 1:
            raise ValueError("--batch-size must be 1 or more")
        with processes(arguments.device) as everyone:
            return _segment(arguments, views, files, everyone)
    except (ValueError, FileNotFoundError) as e:
        return complain(PROGRAM, e, USAGE)


def _segment(arguments: argparse.Namespace, views: Views, files: list[tuple[Path, Path]], everyone: Processes) -> int:
    network, normalize, palette, longest = _load(arguments, everyone)
    wanted = [(file, output_paths(arguments.out, below, arguments.kinds)) for file, below in files]
    # Decided once: a process that looks later would find what the others have written meanwhile.
    there = everyone.from_first([not arguments.overwrite and all(p.exists() for p in to.values()) for _, to in wanted])
    rows: list[dict[str, Any]] = [{"image": str(file), "kept": True} for (file, _), kept in zip(wanted, there) if kept]
    todo = [each for each, kept in zip(wanted, there) if not kept]
    mine = todo[everyone.rank :: everyone.count]
    done: list[dict[str, Any]] = []
    bar = tqdm(total=len(mine), unit="photo", disable=None if everyone.first else True)
    for batch in _batches(mine, longest, arguments.batch_size, done):
        images = torch.stack([normalize(shown) for _, _, _, shown in batch]).to(everyone.device)
        with autocast(everyone.device, arguments.amp):
            values, classes = predict(network, images, views)
        for (file, to, photo, _), value, labels in zip(batch, values.cpu().numpy(), classes.cpu().numpy()):
            for kind, path in to.items():
                save(draw(kind, photo, labels, value, palette), path)
            outputs = {kind: str(path) for kind, path in to.items()}
            done.append({"image": str(file), "outputs": outputs, "classes": _shares(labels, palette)})
        bar.update(len(batch))
    bar.close()
    for share in everyone.gather(done):
        rows += share
    failed = [row for row in rows if "error" in row]
    if everyone.first:
        _print(rows, arguments, views)
    return FAILED if failed else OK


def _load(arguments: argparse.Namespace, everyone: Processes) -> tuple[nn.Module, Any, Palette, int]:
    name, file = arguments.model, arguments.checkpoint
    # A file of the caller's goes with any architecture; with the name of published weights it has their classes.
    alone = file is not None and name in MODELS
    source = load_source(file, name) if alone else load_source(name, checkpoint=file)
    if source.task != "segmentation":
        raise UnknownNameError(f"{source.text} is for {source.task}, not for segmentation")
    network = source.model.to(everyone.device).eval()
    values = v2.Normalize(source.input.mean, source.input.std)
    normalize = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), values])
    num_classes: Any = network.num_classes
    longest = source.longest if arguments.longest is None else arguments.longest
    return network, normalize, palette_of(num_classes, source.classes), longest


def _batches(
    files: list[tuple[Path, dict[str, Path]]], longest: int, batch_size: int, failed: list[dict[str, Any]]
) -> Iterator[list[tuple[Path, dict[str, Path], Image.Image, Image.Image]]]:
    """Neighbours of one size together: file, outputs, the photo, and what the network is shown of it."""

    def opened() -> Iterator[tuple[Path, dict[str, Path], Image.Image, Image.Image]]:
        for file, to in files:
            try:
                photo = open_rgb(file)
            except ImageError as e:
                failed.append({"image": str(file), "error": str(e)})
                complain(PROGRAM, e, FAILED)
                continue
            yield file, to, photo, resized(photo, longest)

    for _, group in groupby(opened(), key=lambda each: each[3].size):
        batch = []
        for each in group:
            batch.append(each)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _shares(classes: np.ndarray, palette: Palette) -> dict[str, float]:
    """The percentage of pixels of each class that is there, the largest first."""
    counts = np.bincount(classes.ravel(), minlength=len(palette.names))
    order = counts.argsort(kind="stable")[::-1]
    return {palette.names[n]: 100 * float(counts[n]) / classes.size for n in order if counts[n]}


def _print(rows: list[dict[str, Any]], arguments: argparse.Namespace, views: Views) -> None:
    if arguments.json:
        options = {"scales": list(views.scales), "flip": views.flip, "fusion": views.fusion, "tile": views.tile}
        print(json.dumps({"model": arguments.model, "views": options, "images": rows}, indent=1, ensure_ascii=False))
        return
    for row in rows:
        if row.get("kept"):
            print(f"{row['image']}: kept what is there (--overwrite makes it anew)")
        elif "classes" in row:
            shares = ", ".join(f"{name} {share:.1f} %" for name, share in list(row["classes"].items())[:5])
            print(f"{row['image']}: {shares}")
