"""Segment photos and write the results as images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from ..datasets.images import ImageError, open_rgb
from ..datasets.transforms import resize_long_side
from ..models.pretrained import Pretrained, load_pretrained
from ..terminal import progress_bar
from ..world import World, autocast
from .outputs import draw, output_paths, save
from .palette import Palette, palette_of
from .predict import Views, predict

DEFAULT_MODEL = "wider_resnet38_deeplab3_iabn.vistas"


@dataclass(frozen=True)
class SegmentOptions:
    """How photos are segmented, and what is written.

    Args:
        out: folder for the results.
        model, checkpoint: the network, see `load_pretrained`.
        kinds: of outputs, see `outputs.KINDS`.
        long_side: longer side that the network is shown, in pixels; 0 does not resize; None: as validated.
        batch_size: photos of one size at once.
        overwrite: replace existing outputs.
    """

    out: Path
    model: str = DEFAULT_MODEL
    checkpoint: str | None = None
    kinds: tuple[str, ...] = ("palette",)
    views: Views = field(default_factory=Views)
    long_side: int | None = None
    batch_size: int = 1
    amp: str = "off"
    overwrite: bool = False


class Photo(NamedTuple):
    """A photo to segment: its file, its outputs by kind, the photo, and what the network is shown of it."""

    file: Path
    outputs: dict[str, Path]
    image: Image.Image
    shown: Image.Image


def segment(
    files: list[tuple[Path, Path]], options: SegmentOptions, world: World, report: Callable[[object], Any]
) -> list[dict[str, Any]]:
    """Segment photos; the ranks share them.

    Args:
        files: each with its path below the folder of the results.
        report: called with the working size, and with the error of every photo that cannot be read.

    Returns:
        A row for every photo of all ranks: `image`, and `kept`, `error`, or `outputs` and `classes` (percentages).

    Raises:
        UnknownNameError, CheckpointError: the network cannot be loaded.
        InUseError: another process writes into the folder of the results.
    """
    network = load_pretrained(options.model, checkpoint=options.checkpoint, task="segmentation")
    with world.exclusive(options.out):
        return _segment_all(files, network, options, world, report)


def _segment_all(
    files: list[tuple[Path, Path]],
    network: Pretrained,
    options: SegmentOptions,
    world: World,
    report: Callable[[object], Any],
) -> list[dict[str, Any]]:
    if world.is_primary:
        report(_working_size(network, options))
    wanted = [(file, output_paths(options.out, below, options.kinds)) for file, below in files]
    # Decided once, by rank 0: another rank could find what was written meanwhile.
    exist = [not options.overwrite and all(path.exists() for path in paths.values()) for _, paths in wanted]
    exist = world.broadcast_object(exist)
    rows: list[dict[str, Any]] = [{"image": str(file), "kept": True} for (file, _), kept in zip(wanted, exist) if kept]
    todo = [each for each, kept in zip(wanted, exist) if not kept]
    for share in world.all_gather_object(_segment(todo[world.rank :: world.size], network, options, world, report)):
        rows += share
    return rows


def _segment(
    todo: list[tuple[Path, dict[str, Path]]],
    network: Pretrained,
    options: SegmentOptions,
    world: World,
    report: Callable[[object], Any],
) -> list[dict[str, Any]]:
    evaluation = network.evaluation
    model = network.model.to(world.device).eval()
    palette = palette_of(network.options["num_classes"], network.classes)
    long_side = evaluation.long_side if options.long_side is None else options.long_side
    normalize = _normalize(network)
    rows: list[dict[str, Any]] = []

    def failed(file: Path, error: ImageError) -> None:
        rows.append({"image": str(file), "error": str(error)})
        report(error)

    bar = progress_bar(shown=world.is_primary, total=len(todo), unit="photo")
    for batch in _batches(todo, long_side, options.batch_size, failed):
        images = torch.stack([normalize(photo.shown) for photo in batch]).to(world.device)
        with autocast(world.device, options.amp):
            values, classes = predict(model, images, options.views)
        for photo, value, labels in zip(batch, values.cpu().numpy(), classes.cpu().numpy()):
            for kind, path in photo.outputs.items():
                save(draw(kind, photo.image, labels, value, palette), path)
            outputs = {kind: str(path) for kind, path in photo.outputs.items()}
            rows.append({"image": str(photo.file), "outputs": outputs, "classes": _shares(labels, palette)})
        bar.update(len(batch))
    bar.close()
    return rows


def _working_size(network: Pretrained, options: SegmentOptions) -> str:
    """A sentence: which size the network is shown, and whether tiles change anything."""
    side = network.evaluation.long_side if options.long_side is None else options.long_side
    shown = f"photos are resized to {side:,} pixels at the longer side" if side else "photos keep their size"
    tile = options.views.tile
    largest = side * max(options.views.scales)
    useless = tile is not None and side and tile >= largest
    return f"{shown} (--long-side)" + (f"; --tile {tile:,} changes nothing, it is not smaller" if useless else "")


def _normalize(network: Pretrained) -> Any:
    evaluation = network.evaluation
    return v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(evaluation.mean, evaluation.std)]
    )


def overlay(network: Pretrained, image: Image.Image) -> Image.Image:
    """The overlay of one RGB picture, on the CPU, with the network's own sizes; see `outputs`."""
    shown = resize_long_side(image, network.evaluation.long_side)
    values, classes = predict(network.model.eval(), _normalize(network)(shown).unsqueeze(0), Views())
    palette = palette_of(network.options["num_classes"], network.classes)
    return draw("overlay", image, classes[0].cpu().numpy(), values[0].cpu().numpy(), palette)


def _batches(
    files: list[tuple[Path, dict[str, Path]]],
    long_side: int,
    batch_size: int,
    failed: Callable[[Path, ImageError], None],
) -> Iterator[list[Photo]]:
    """Consecutive photos of one size, up to `batch_size` at a time."""

    def opened() -> Iterator[Photo]:
        for file, outputs in files:
            try:
                image = open_rgb(file)
            except ImageError as e:
                failed(file, e)
                continue
            yield Photo(file, outputs, image, resize_long_side(image, long_side))

    for _, group in groupby(opened(), key=lambda photo: photo.shown.size):
        batch: list[Photo] = []
        for photo in group:
            batch.append(photo)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _shares(classes: np.ndarray, palette: Palette) -> dict[str, float]:
    """The percentage of pixels of each class that occurs, the largest first."""
    counts = np.bincount(classes.ravel(), minlength=len(palette.names))
    order = counts.argsort(kind="stable")[::-1]
    return {palette.names[n]: 100 * float(counts[n]) / classes.size for n in order if counts[n]}
