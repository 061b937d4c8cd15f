"""Scenes: images with a class for every pixel, from the folders of Vistas, of Cityscapes, or plain ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import Cityscapes
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from ..checkpoints.export import write_atomically
from ..images import ImageError, open_rgb
from ..processes import Processes
from ..segmentation.pictures import resized
from .data import Samples, start_worker
from .recipe import Recipe
from .splits import DataError
from .transforms import JITTER

ORIENTATION = 0x0112  # the EXIF tag
IGNORED, UNKNOWN = 255, 254  # in tensors of labels: nothing that counts; in the table: a number that means no class
VISTAS = {"train": "training", "val": "validation"}
EXPECTED = """expected ROOT/train/images/* and ROOT/train/labels/*.png, val likewise (and, for their names, \
ROOT/classes.json, a list); or Mapillary Vistas, ROOT/training/…; or Cityscapes, ROOT/leftImg8bit and ROOT/gtFine"""


@dataclass
class Scenes:
    """Image and label files in pairs.

    Args:
        classes: their names, in the order of the network's classes; None where nothing says them.
        table: (256,) uint8; the class of each number in a label file, IGNORED or UNKNOWN.
        presence: (scenes, classes) bool, which classes each scene has; needed for `uniform` above 0.
        uniform: part of an epoch that is drawn by class.
    """

    images: list[Path]
    labels: list[Path]
    classes: tuple[str, ...] | None
    table: np.ndarray
    presence: np.ndarray | None = field(default=None, repr=False)
    uniform: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def count(self) -> int:
        """The number of classes."""
        return int((self.table < UNKNOWN).sum())

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """The image, RGB, and the class of each pixel, 8 bits.

        Raises:
            ImageError: one of the files cannot be read, or they do not belong together.
        """
        path = self.images[index]
        image, label = open_rgb(path), self.read_label(index)
        with Image.open(path) as file:
            if file.getexif().get(ORIENTATION, 1) != 1:
                raise ImageError(
                    f"{path}: is turned by its EXIF orientation, and nothing says whether its labels are: store it "
                    "upright, without that tag"
                )
        if image.size != label.size:
            raise ImageError(f"{self.labels[index]}: is {label.size}, its image {image.size} pixels large")
        return image, label

    def read_label(self, index: int) -> Image.Image:
        """The class of each pixel, IGNORED where there is none."""
        path = self.labels[index]
        try:
            with Image.open(path) as file:
                if file.mode not in ("L", "P", "1"):
                    raise ImageError(
                        f"{path}: has mode {file.mode}; a label file has one number of 8 bits per pixel (L or P)"
                    )
                if file.tile and file.tile[0][3] in ("L;2", "L;4"):  # Pillow would multiply the numbers
                    raise ImageError(f"{path}: has 2 or 4 bits of grey; a label file has 8 bits per pixel (L or P)")
                numbers = np.asarray(file)
        except ImageError:
            raise
        except Exception as e:  # as many ways as there are decoders
            raise ImageError(f"{path}: cannot be read as an image of labels: {e}") from e
        classes = self.table[numbers.astype(np.uint8)]
        if (classes == UNKNOWN).any():
            known = self.count
            raise ImageError(
                f"{path}: has the number {numbers[classes == UNKNOWN][0]}, which is none of the {known} classes: "
                "say how many there are (network.classes), or which number counts as nothing (segmentation.ignore; "
                "--ignore in validate.py)"
            )
        return Image.fromarray(classes)


def open_scenes(root: Path, split: str, classes: int, ignore: int = IGNORED) -> Scenes:
    """The scenes of one split.

    Args:
        classes: how many there are, where the data does not say it.
        ignore: number in the label files that means nothing, besides IGNORED.

    Raises:
        DataError: the folder is laid out in no way that is known, or files are missing.
    """
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root, split, ignore)
    folder = next((root / name for name in (split, VISTAS.get(split, split)) if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{root / split} is not a folder: {EXPECTED}")
    labels_in = next((folder / name for name in ("labels", "v1.2/labels") if (folder / name).is_dir()), None)
    if labels_in is None or not (folder / "images").is_dir():
        raise DataError(f"{folder}: has no images and labels: {EXPECTED}")
    images = sorted(p for p in (folder / "images").rglob("*") if _is_image(p))
    labels = [(labels_in / path.relative_to(folder / "images")).with_suffix(".png") for path in images]
    _check_files(folder, images, labels)
    named = _classes(root)
    if named is not None and len(named) > UNKNOWN:
        raise DataError(f"{root}: names {len(named)} classes, and a label file of 8 bits has room for {UNKNOWN}")
    if named is None and classes > UNKNOWN:
        raise DataError(
            f"{root}: has no classes.json that names the classes, and {classes} are too many: write it, or say how "
            f"many there are (--set network.classes=…, 1 to {UNKNOWN})"
        )
    table = np.full(256, UNKNOWN, np.uint8)
    numbers = range(classes) if named is None else [n for n, (_, counts) in enumerate(named) if counts]
    _check_ignored(root, ignore, numbers)
    table[: classes if named is None else len(named)] = IGNORED  # what the dataset itself leaves out
    table[list(numbers)] = range(len(numbers))
    table[[ignore, IGNORED]] = IGNORED
    return Scenes(images, labels, None if named is None else tuple(named[n][0] for n in numbers), table)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def _classes(root: Path) -> list[tuple[str, bool]] | None:
    """The name of each number and whether it counts, as Vistas' file or classes.json says; None without one."""
    for name in ("config_v1.2.json", "config.json", "classes.json"):
        path = root / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, list) and content and all(isinstance(each, str) for each in content):
                return [(each, True) for each in content]
            return [(str(each["readable"]), bool(each["evaluate"])) for each in content["labels"]]
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"{path}: is neither a list of names nor Vistas' description of its labels ({type(e).__name__}: {e})"
            ) from e
    return None


def _check_ignored(root: Path, ignore: int, numbers: Iterable[int]) -> None:
    if ignore in numbers:
        raise DataError(
            f"{root}: {ignore} is to be ignored (segmentation.ignore, --ignore), and is the number of a class: name "
            'the classes in classes.json, {"labels": [{"readable": "void", "evaluate": false}, …]}, one for each number'
        )


def _cityscapes(root: Path, split: str, ignore: int) -> Scenes:
    for folder in (root / "leftImg8bit" / split, root / "gtFine" / split):  # torchvision would unpack archives
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: {EXPECTED}")
    found = Cityscapes(str(root), split, mode="fine", target_type="semantic")
    # torchvision's order is that of the disk.
    pairs = sorted((Path(image), Path(target[0])) for image, target in zip(found.images, found.targets))
    images, labels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    _check_files(root, images, labels)
    table = np.full(256, UNKNOWN, np.uint8)
    trained = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < IGNORED), key=lambda c: c.train_id)
    _check_ignored(root, ignore, [c.id for c in trained])
    table[[c.id for c in Cityscapes.classes if c.id >= 0]] = IGNORED
    table[[c.id for c in trained]] = range(len(trained))
    table[IGNORED] = IGNORED
    return Scenes(images, labels, tuple(c.name for c in trained), table)


def _check_files(folder: Path, images: list[Path], labels: list[Path]) -> None:
    if not images:
        raise DataError(f"{folder}: has no images: {EXPECTED}")
    missing = [path for path in labels if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: there is no such file; {len(missing)} of {len(images)} images have no labels")


class SceneSamples(Samples):
    """Scenes and what the transform makes of them."""

    source: Scenes

    def _read(self, index: int) -> tuple[Any, Any]:
        return self.source.read(index)

    def _vary(self, image: Any, label: Any, focus: int) -> tuple[Tensor, int | Tensor]:
        varied: tuple[Tensor, Tensor] = self.transform(image, label, focus)
        return varied

    def name(self, index: int) -> str:
        return str(self.source.images[index])

    def order(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """As many as there are scenes; `uniform` of them by class: the classes in turn, any scene that has it."""
        count = len(self.source)
        by_class: list[tuple[int, int]] = []
        if self.source.presence is not None and self.source.uniform > 0:
            scenes = [np.flatnonzero(column) for column in self.source.presence.T]
            there = [number for number, having in enumerate(scenes) if len(having)]
            turns = torch.randperm(len(there), generator=generator).tolist()
            for place in range(round(self.source.uniform * count) if there else 0):
                focus = there[turns[place % len(there)]]
                which = int(torch.randint(len(scenes[focus]), (), generator=generator))
                by_class.append((int(scenes[focus][which]), focus))
        rest = torch.randperm(count, generator=generator)[: count - len(by_class)].tolist()
        pairs = by_class + [(index, -1) for index in rest]
        return [pairs[at] for at in torch.randperm(count, generator=generator).tolist()]


class SceneCrops:
    """Training: a scene at a random scale, a crop of it, mirrored or not, with other colours.

    Gives (3, crop, crop) and (crop, crop), uint8. Where the scene is smaller than the crop, there is the mean colour,
    and nothing that counts.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.crop, self.base = recipe.input.crop_train, recipe.input.scale_train
        self.scales = (recipe.segmentation.min_scale, recipe.segmentation.max_scale)
        self.hflip = recipe.training.hflip
        self.grey = tuple(round(255 * value) for value in recipe.input.mean)
        jitter = recipe.input.color_jitter_train
        self.colors = v2.ColorJitter(brightness=JITTER, contrast=JITTER, saturation=JITTER) if jitter else None

    def __call__(self, image: Image.Image, label: Image.Image, focus: int) -> tuple[Tensor, Tensor]:
        low, high = self.scales
        scale = low + (high - low) * float(torch.rand(()))
        if self.base > 0:
            scale *= self.base / min(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        start = self._start(size, label, focus)
        shown = [min(self.crop, side) for side in size]
        # The crop's place in the scene itself: only what is in it is scaled.
        (left, right), (top, bottom) = (
            (at * whole / side, (at + part) * whole / side)
            for at, part, side, whole in zip(start, shown, size, image.size)
        )
        box = (left, top, right, bottom)
        canvas = Image.new("RGB", (self.crop, self.crop), self.grey)
        canvas.paste(image.resize((shown[0], shown[1]), Image.Resampling.BILINEAR, box))
        classes = Image.new("L", (self.crop, self.crop), IGNORED)
        classes.paste(label.resize((shown[0], shown[1]), Image.Resampling.NEAREST, box))
        if self.colors is not None:
            canvas = self.colors(canvas)
        pixels, numbers = v2.functional.pil_to_tensor(canvas), v2.functional.pil_to_tensor(classes)[0]
        if float(torch.rand(())) < self.hflip:
            pixels, numbers = pixels.flip(-1), numbers.flip(-1)
        return pixels, numbers

    def _start(self, size: list[int], label: Image.Image, focus: int) -> list[int]:
        """The crop's left and top in the scaled scene: anywhere, or so that it holds some pixel of the focus."""
        point: list[int] | None = None
        if focus >= 0:
            there = np.flatnonzero(np.asarray(label) == focus)
            if len(there):  # not where another scene stands in for one that cannot be read
                at = int(there[int(torch.randint(len(there), ()))])
                inside = (at % label.width + 0.5, at // label.width + 0.5)
                point = [int(where * side / whole) for where, side, whole in zip(inside, size, label.size)]
        starts = []
        for axis, side in enumerate(size):
            low, high = 0, max(side - self.crop, 0)
            if point:
                low, high = min(max(low, point[axis] - self.crop + 1), high), min(high, point[axis])
            starts.append(low + int(torch.randint(high - low + 1, ())))
        return starts


class WholeScenes:
    """Validation: the scene with its longer side `longest` pixels long (0: as it is), and its labels as they are."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __call__(self, image: Image.Image, label: Image.Image, focus: int) -> tuple[Tensor, Tensor]:
        shown = resized(image, self.longest)
        return v2.functional.pil_to_tensor(shown), v2.functional.pil_to_tensor(label)[0]


class _Labels(Dataset[list[int] | None]):
    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __getitem__(self, index: int) -> list[int] | None:
        try:
            histogram = self.scenes.read_label(index).histogram()
        except ImageError:
            return None  # training says so when it comes there
        return [number for number, pixels in enumerate(histogram[:UNKNOWN]) if pixels]


def find_presence(scenes: Scenes, note: Path, workers: int, everyone: Processes) -> np.ndarray:
    """Which classes each scene has, (scenes, classes) bool. Every label file is read once, and `note` remembers it.

    The processes share the work; the first one writes the note.
    """
    stats = [path.stat() for path in scenes.labels]
    lines = [
        f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns}" for path, stat in zip(scenes.labels, stats)
    ]
    digest = hashlib.sha256("\n".join([scenes.table.tobytes().hex(), *lines]).encode()).hexdigest()
    known = everyone.from_first(_noted(note, digest) if everyone.first else None)
    if known is not None:
        return np.asarray(known)
    mine = range(everyone.rank, len(scenes), everyone.count)
    loader = DataLoader(
        _Labels(scenes), batch_size=None, sampler=mine, num_workers=workers, generator=torch.Generator(),
        worker_init_fn=start_worker,
    )  # fmt: skip
    bar = tqdm(loader, "classes of the scenes", len(mine), unit="file", disable=None if everyone.first else True)
    rows = list(zip(mine, bar))
    presence = np.zeros((len(scenes), scenes.count), bool)
    every = [row for share in everyone.gather(rows) for row in share]
    for index, found in every:
        presence[index, found or []] = True
    if everyone.first and all(found is not None for _, found in every):  # else another time may read more
        file = io.BytesIO()
        np.savez_compressed(file, digest=np.array(digest), presence=presence)
        os.makedirs(note.parent, exist_ok=True)
        write_atomically(note, file.getvalue())
    return presence


def _noted(note: Path, digest: str) -> np.ndarray | None:
    try:
        with np.load(note, allow_pickle=False) as content:
            return content["presence"] if str(content["digest"]) == digest else None
    except Exception:  # not there, damaged, or another's: it is made again
        return None
