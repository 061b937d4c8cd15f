"""Image classification datasets: class folders, tar files, shards, and what timm reads under a name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets import ImageFolder


@dataclass(frozen=True)
class Location:
    """Where images are: a folder with `train` and `val` in it, or what `timm.data.create_dataset` reads.

    `dataset` is a name of timm's: wds, hfds/NAME, hfids/NAME, tfds/NAME, torch/NAME; empty for folders of class folders
    and for tar files, one a split or one a class. `samples` are the images of a stream whose shards do not say it.
    """

    root: str
    dataset: str = ""
    train_split: str = "train"
    val_split: str = "val"
    train_samples: int | None = None
    val_samples: int | None = None
    download: bool = False


SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
VALIDATED = 5  # of a folder without splits, every such image of a class is for validation


class DataError(ValueError):
    """The data is not as training or validation needs it; the message says where and how it should be."""


def open_split(location: Location, split: str, training: bool = False, batch_size: int = 1, seed: int = 0) -> Any:
    """The images of one split, as torchvision's or timm's dataset without a transform.

    Raises:
        DataError: nothing is there, or the package that reads it is missing.
    """
    root = Path(location.root)
    try:
        if not location.dataset:
            return _open_folder(root, split)
        samples = location.train_samples if training else location.val_samples
        return timm.data.create_dataset(
            location.dataset if "/" in location.dataset else f"{location.dataset}/",
            root=location.root or None,
            split=split,
            is_training=training,
            batch_size=batch_size,
            num_samples=samples,
            seed=seed,
            download=location.download,
        )
    except DataError:
        raise
    except Exception as e:  # whatever the packages behind these names raise
        what = f"{location.dataset} {location.root}".strip()
        raise DataError(f"{what}: split {split!r} cannot be opened: {str(e).strip() or type(e).__name__}") from e


def _open_folder(root: Path, split: str) -> Any:
    folder, tar = root / split, root / f"{split}.tar"
    if tar.is_file() or (folder.is_dir() and any(folder.glob("*.tar"))):
        place = tar if tar.is_file() else folder
        # timm would keep a pickle beside a large tar, and open files that forked workers share with their positions.
        reader = ReaderImageInTar(str(place), cache_tarfiles=False, cache_tarinfo=False)
        return timm.data.ImageDataset(str(place), reader=reader)
    splits = any((root / each).is_dir() for each in ("train", "val"))
    if root.is_dir() and split in ("train", "val") and not splits:
        return _part_of_folder(root, split)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: expected {root}/train/CLASS/* and {root}/val/CLASS/*")
    # Not timm's reader: its order of the classes is another one, and leaves of the same name become one class.
    return ImageFolder(str(folder))


class _Classes(ImageFolder):
    """The folders in a folder but the hidden ones; `note` says what was done with them."""

    note = ""

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not names:
            raise FileNotFoundError("it holds no folders")
        return names, {name: number for number, name in enumerate(names)}


def _part_of_folder(root: Path, split: str) -> ImageFolder:
    """The images of a folder ROOT/CLASS/*: every fifth of each class is for validation, the others are for training."""
    names = [each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")]
    splits = [name for name in names if name.lower() in SPLITS]
    if splits or len(names) == 1:
        named = f"{', '.join(splits)} is no class" if splits else f"{names[0]} is the only class"
        raise DataError(f"{root}: {named}: expected CLASS/* for two classes or more, or train/CLASS/* and val/CLASS/*")
    try:
        folder = _Classes(str(root))
    except OSError as e:
        raise DataError(f"{root}: expected CLASS/* in it, or train/CLASS/* and val/CLASS/* ({e})") from e
    seen: dict[int, int] = {}
    chosen = []
    for path, label in folder.samples:
        seen[label] = seen.get(label, 0) + 1
        if (seen[label] % VALIDATED == 0) == (split == "val"):
            chosen.append((path, label))
    few = [name for name, label in folder.class_to_idx.items() if seen.get(label, 0) < VALIDATED]
    if few:
        raise DataError(f"{root}: {', '.join(few[:5])} has fewer than {VALIDATED} images, so none to validate on")
    what = "validated" if split == "val" else "for training"
    folder.note = (
        f"{root} has no train/ and val/: {len(chosen):,} of {len(folder.samples):,} images are {what}, every fifth "
        "image of a class is for validation"
    )
    folder.samples = folder.imgs = chosen
    folder.targets = [label for _, label in chosen]
    return folder


def classes_of(dataset: Any) -> tuple[str, ...] | None:
    """The names of its classes in the order of the labels; None where it does not know them.

    Raises:
        DataError: a name is not UTF-8, which no file of a run could hold.
    """
    reader = getattr(dataset, "reader", dataset)
    numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    for name in numbers or ():
        if re.search("[\ud800-\udfff]", str(name)):
            raise DataError(f"the folder {name!a} of a class has a name that is not UTF-8: rename it")
    return tuple(sorted(numbers, key=lambda name: int(numbers[name]))) if numbers else None


def check_same_classes(location: Location, train: Any, val: Any) -> None:
    """Refuse two splits with different classes.

    Raises:
        DataError: names the classes that one of them lacks.
    """
    ours, theirs = classes_of(train), classes_of(val)
    if ours and theirs and ours != theirs:
        lacks = [
            f"{split} has no {', '.join(missing[:5])}"
            for split, missing in (
                (location.val_split, sorted(set(ours) - set(theirs))),
                (location.train_split, sorted(set(theirs) - set(ours))),
            )
            if missing
        ]
        raise DataError(f"{location.root}: the splits have different classes: {'; '.join(lacks)}")
