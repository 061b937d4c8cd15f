"""Segmentation datasets: images with a class for every pixel, from Mapillary Vistas, Cityscapes, or plain folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import Cityscapes
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..schema import load_json
from .folders import DataError
from .images import ImageError, open_rgb
from .samples import Samples

ORIENTATION = 0x0112  # the EXIF tag
IGNORE_INDEX = 255  # in label tensors: not scored
UNKNOWN = 254  # in the table of classes: a value that stands for no class
VISTAS = {"train": "training", "val": "validation"}
EXPECTED = """expected ROOT/train/images/* and ROOT/train/labels/*.png, val likewise (and, for their names, \
ROOT/classes.json, a list); or Mapillary Vistas, ROOT/training/…; or Cityscapes, ROOT/leftImg8bit and ROOT/gtFine"""


@dataclass(frozen=True)
class SegmentationDataset:
    """Pairs of image and label files.

    Args:
        classes: their names, in the order of the network's classes; None where the dataset does not name them.
        table: (256,) uint8; the class of each value in a label file, IGNORE_INDEX or UNKNOWN.
        presence: (images, classes) bool, which classes each image contains; needed for `class_balanced` above 0.
        class_balanced: fraction of an epoch whose target class is sampled uniformly.
    """

    images: list[Path]
    labels: list[Path]
    classes: tuple[str, ...] | None
    table: np.ndarray
    presence: np.ndarray | None = field(default=None, repr=False)
    class_balanced: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def balanced(self, presence: np.ndarray, fraction: float) -> SegmentationDataset:
        """The same images, with a fraction of each epoch sampled by class."""
        return replace(self, presence=presence, class_balanced=fraction)

    @property
    def num_classes(self) -> int:
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
        """The class of each pixel, IGNORE_INDEX where there is none."""
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
            known = self.num_classes
            raise ImageError(
                f"{path}: has the number {numbers[classes == UNKNOWN][0]}, which is none of the {known} classes: "
                "set the number of classes (network.classes), or the value that is not scored "
                "(segmentation.ignore_index; --ignore-index of iabn-hub validate)"
            )
        return Image.fromarray(classes)


def open_segmentation(root: Path, split: str, classes: int, ignore_index: int = IGNORE_INDEX) -> SegmentationDataset:
    """The images and labels of one split.

    Args:
        classes: how many there are, where the data does not say it.
        ignore_index: value in the label files that is not scored, besides IGNORE_INDEX.

    Raises:
        DataError: the folder is laid out in no way that is known, or files are missing.
    """
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root, split, ignore_index)
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
    _check_ignored(root, ignore_index, numbers)
    table[: classes if named is None else len(named)] = IGNORE_INDEX  # what the dataset itself leaves out
    table[list(numbers)] = range(len(numbers))
    table[[ignore_index, IGNORE_INDEX]] = IGNORE_INDEX
    return SegmentationDataset(images, labels, None if named is None else tuple(named[n][0] for n in numbers), table)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def _classes(root: Path) -> list[tuple[str, bool]] | None:
    """The name of each number and whether it counts, as Vistas' file or classes.json says; None without one."""
    for name in ("config_v1.2.json", "config.json", "classes.json"):
        path = root / name
        if not path.is_file():
            continue
        content = load_json(path, DataError)
        try:
            if isinstance(content, list) and content and all(isinstance(each, str) for each in content):
                return [(each, True) for each in content]
            return [(str(each["readable"]), bool(each["evaluate"])) for each in content["labels"]]
        except (KeyError, TypeError) as e:
            raise DataError(
                f"{path}: is neither a list of names nor Vistas' description of its labels ({type(e).__name__}: {e})"
            ) from e
    return None


def _check_ignored(root: Path, ignore_index: int, numbers: Iterable[int]) -> None:
    if ignore_index in numbers:
        raise DataError(
            f"{root}: {ignore_index} is the ignore index (segmentation.ignore_index, --ignore-index) and also the "
            "number of a class: name "
            'the classes in classes.json, {"labels": [{"readable": "void", "evaluate": false}, …]}, one for each number'
        )


def _cityscapes(root: Path, split: str, ignore_index: int) -> SegmentationDataset:
    for folder in (root / "leftImg8bit" / split, root / "gtFine" / split):  # torchvision would unpack archives
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: {EXPECTED}")
    found = Cityscapes(str(root), split, mode="fine", target_type="semantic")
    # torchvision's order is that of the disk.
    pairs = sorted((Path(image), Path(target[0])) for image, target in zip(found.images, found.targets))
    images, labels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    _check_files(root, images, labels)
    table = np.full(256, UNKNOWN, np.uint8)
    trained = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < IGNORE_INDEX), key=lambda c: c.train_id)
    _check_ignored(root, ignore_index, [c.id for c in trained])
    table[[c.id for c in Cityscapes.classes if c.id >= 0]] = IGNORE_INDEX
    table[[c.id for c in trained]] = range(len(trained))
    table[IGNORE_INDEX] = IGNORE_INDEX
    return SegmentationDataset(images, labels, tuple(c.name for c in trained), table)


def _check_files(folder: Path, images: list[Path], labels: list[Path]) -> None:
    if not images:
        raise DataError(f"{folder}: has no images: {EXPECTED}")
    missing = [path for path in labels if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: there is no such file; {len(missing)} of {len(images)} images have no labels")


class SegmentationSamples(Samples):
    """The transformed images and labels of a segmentation dataset."""

    source: SegmentationDataset

    def _read(self, index: int) -> tuple[Any, Any]:
        return self.source.read(index)

    def _transformed(self, image: Any, label: Any, target_class: int) -> tuple[Tensor, int | Tensor]:
        transformed: tuple[Tensor, Tensor] = self.transform(image, label, target_class)
        return transformed

    def files(self) -> list[Any]:
        return [*self.source.images, *self.source.labels]

    def name(self, index: int) -> str:
        return str(self.source.images[index])

    def order(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """Index and target class of every position of an epoch, shuffled.

        A fraction `class_balanced` of them is sampled by class: the classes in turn, for each a random image with it.
        """
        count = len(self.source)
        by_class: list[tuple[int, int]] = []
        if self.source.presence is not None and self.source.class_balanced > 0:
            images = [np.flatnonzero(column) for column in self.source.presence.T]
            present = [number for number, having in enumerate(images) if len(having)]
            turns = torch.randperm(len(present), generator=generator).tolist()
            for position in range(round(self.source.class_balanced * count) if present else 0):
                target = present[turns[position % len(present)]]
                which = int(torch.randint(len(images[target]), (), generator=generator))
                by_class.append((int(images[target][which]), target))
        rest = torch.randperm(count, generator=generator)[: count - len(by_class)].tolist()
        pairs = by_class + [(index, -1) for index in rest]
        return [pairs[at] for at in torch.randperm(count, generator=generator).tolist()]
