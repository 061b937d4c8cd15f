"""Which classes each image of a segmentation dataset contains, for class-balanced sampling."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..files import write_atomically
from ..terminal import progress_bar
from ..world import World
from .images import ImageError
from .loaders import start_worker
from .segmentation import UNKNOWN, SegmentationDataset


class _Labels(Dataset[list[int] | None]):
    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> list[int] | None:
        try:
            histogram = self.dataset.read_label(index).histogram()
        except ImageError:
            return None  # reported when training reads it
        return [number for number, pixels in enumerate(histogram[:UNKNOWN]) if pixels]


def find_presence(dataset: SegmentationDataset, cache: Path, workers: int, world: World) -> np.ndarray:
    """Which classes each image contains, (images, classes) bool.

    The ranks share the label files, which are read once; rank 0 stores the result in `cache`.
    """
    stats = [path.stat() for path in dataset.labels]
    lines = [
        f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns}" for path, stat in zip(dataset.labels, stats)
    ]
    digest = hashlib.sha256("\n".join([dataset.table.tobytes().hex(), *lines]).encode()).hexdigest()
    known = world.broadcast_object(_cached(cache, digest) if world.is_primary else None)
    if known is not None:
        return np.asarray(known)
    mine = range(world.rank, len(dataset), world.size)
    loader = DataLoader(
        _Labels(dataset), batch_size=None, sampler=mine, num_workers=workers, generator=torch.Generator(),
        worker_init_fn=start_worker,
    )  # fmt: skip
    bar = progress_bar(loader, "classes of the images", world.is_primary, total=len(mine), unit="file")
    rows = list(zip(mine, bar))
    presence = np.zeros((len(dataset), dataset.num_classes), bool)
    every = [row for share in world.all_gather_object(rows) for row in share]
    for index, found in every:
        presence[index, found or []] = True
    if world.is_primary and all(found is not None for _, found in every):  # else a later run may be able to read more
        file = io.BytesIO()
        np.savez_compressed(file, digest=np.array(digest), presence=presence)
        os.makedirs(cache.parent, exist_ok=True)
        write_atomically(cache, file.getvalue())
    return presence


def _cached(cache: Path, digest: str) -> np.ndarray | None:
    try:
        with np.load(cache, allow_pickle=False) as content:
            return content["presence"] if str(content["digest"]) == digest else None
    except Exception:  # missing, damaged, or of other files: computed again
        return None
