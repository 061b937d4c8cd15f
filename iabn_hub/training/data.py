"""Image folders as batches: `train/CLASS/*` and `val/CLASS/*`, in the layout of torchvision's ImageFolder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied: random crops of at least `min_scale` of the area, and mirroring."""

    min_scale: float = 0.08
    hflip: float = 0.5


@dataclass(frozen=True)
class Folders:
    """Batches of a data folder, and the names of its classes in the order of the logits."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    classes: tuple[str, ...]


def open_folders(
    root: Path, cfg: dict[str, Any], augmentation: Augmentation, batch_size: int, workers: int, seed: int
) -> Folders:
    """Loaders for `root`/train (shuffled, augmented) and `root`/val (in order, whole).

    Args:
        cfg: timm's data settings: input_size, mean, std, interpolation, crop_pct.

    Raises:
        ValueError: a folder is missing, or the two do not have the same classes.
    """
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise ValueError(f"{root / part} is not a folder: expected {root}/train/CLASS/* and {root}/val/CLASS/*")
    augmented = timm.data.create_transform(
        **cfg,
        is_training=True,
        scale=(augmentation.min_scale, 1.0),
        ratio=(0.85, 1.18),
        hflip=augmentation.hflip,
        color_jitter=0.0,
    )
    train = ImageFolder(str(root / "train"), augmented)
    val = ImageFolder(str(root / "val"), timm.data.create_transform(**cfg))
    if train.classes != val.classes:
        differ = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"{root}: train and val have different classes: {', '.join(differ[:5])}")
    order = torch.Generator().manual_seed(seed)
    return Folders(
        DataLoader(train, batch_size, shuffle=True, drop_last=True, num_workers=workers, generator=order),
        DataLoader(val, batch_size, num_workers=workers),
        tuple(train.classes),
    )
