"""Read and transform single images, with random numbers that follow from the seed and the position alone.

The random numbers of a transform are derived from (seed, epoch, position), so neither the number of workers nor a
restart in the middle of an epoch changes what the network sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import timm.data
import torch
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder

from ..world import World
from .decoded import DecodedImages
from .folders import DataError
from .images import ImageError, open_rgb

SUBSTITUTES = 10  # images tried in place of one that cannot be read


class Key(NamedTuple):
    """The index that a sampler hands to a dataset: a position in an epoch and the image at it.

    `target_class` is the class that a crop must contain, or −1.
    """

    epoch: int
    position: int
    image: int
    target_class: int = -1


class Sample(NamedTuple):
    """One image, (3, H, W) or (10, 3, H, W) uint8, or None; its class, or the class of each pixel, (H, W) uint8; its
    index; why files were skipped on the way."""

    image: Tensor | None
    label: int | Tensor
    image_index: int
    skipped: tuple[str, ...]


class Batch(NamedTuple):
    """images (N, 3, H, W) or (N, 10, 3, H, W) uint8; labels (N,) int64, or (N, H, W) uint8; indices (N,) int64; why
    files were skipped."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    skipped: tuple[str, ...]


def collate(samples: list[Sample]) -> Batch:
    """A batch of the images that could be read."""
    read = [sample for sample in samples if sample.image is not None]
    return Batch(
        torch.stack([s.image for s in read if s.image is not None]) if read else torch.empty(0, 3, 1, 1),
        torch.stack([torch.as_tensor(s.label) for s in read]) if read else torch.empty(0, dtype=torch.long),
        torch.tensor([s.image_index for s in read], dtype=torch.long),
        tuple(reason for sample in samples for reason in sample.skipped),
    )


class Samples(Dataset[Sample]):
    """The transformed images of a source that is read in any order.

    Args:
        source: a dataset of torchvision or timm without a transform.
        transform: of the image, in a worker.
        seed: of all that is random in the transform.
        training: replace an image that cannot be read by the next one that can.
    """

    decoded: DecodedImages | None = None

    def __init__(self, source: Any, transform: Any, seed: int = 0, training: bool = False) -> None:
        self.source, self.transform, self.seed, self.training = source, transform, seed, training

    def keep_decoded(self, shorter_side: int) -> None:
        """Decode each image once, and resize it to `shorter_side` if that is not 0, for all epochs.

        Raises:
            DataError: there is no room for them, or the images are not files.
        """
        files = self._files()
        if files is None:
            raise DataError("--cache-images needs images in files: a folder with CLASS/*")
        self.decoded = DecodedImages([path for path, _ in files], shorter_side)

    def _files(self) -> Any:
        """Path and class of each image, or None where they are not files of their own."""
        source = self.source
        if isinstance(source, ImageFolder):
            return source.samples
        reader = getattr(source, "reader", None)
        return reader.samples if isinstance(reader, ReaderImageFolder) else None

    def files(self) -> list[Any] | None:
        """All files that are read, or None where the images are not files of their own."""
        pairs = self._files()
        return None if pairs is None else [path for path, _ in pairs]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def note(self) -> str:
        """What the reader of a log should know about the source; '' if nothing."""
        return str(getattr(self.source, "note", ""))

    def __getitem__(self, key: Key) -> Sample:
        """The image at this key; in training, if it cannot be read, the next of `SUBSTITUTES`; else none."""
        epoch, position, index, target_class = key
        skipped: list[str] = []
        for attempt in range(SUBSTITUTES if self.training else 1):
            at = (index + attempt) % len(self.source)
            try:
                image, label = self._read(at)
            except ImageError as e:
                skipped.append(str(e))
                continue
            with seeded(self.seed, epoch, position):
                return Sample(*self._transformed(image, label, target_class), at, tuple(skipped))
        return Sample(None, 0, index, tuple(skipped))

    def _transformed(self, image: Any, label: Any, target_class: int) -> tuple[Tensor, int | Tensor]:
        return self.transform(image), label

    def order(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """Index and target class of every image of an epoch, shuffled."""
        return [(index, -1) for index in torch.randperm(len(self.source), generator=generator).tolist()]

    def _read(self, index: int) -> tuple[Any, Any]:
        if self.decoded is None:
            return self._open(index)
        image = self.decoded.get(index)
        if image is not None:
            return image, int(self._files()[index][1])
        image, label = self._open(index)
        return self.decoded.put(index, image), label

    def _open(self, index: int) -> tuple[Any, Any]:
        if isinstance(self.source, ImageFolder):
            path, label = self.source.samples[index]
            return open_rgb(path), label
        if not isinstance(self.source, timm.data.ImageDataset):  # another of torchvision's, read whole into memory
            image, label = self.source[index]
            return image.convert("RGB"), int(label)
        try:
            file, label = self.source.reader[index]
        except OSError as e:
            raise ImageError(f"{self.name(index)}: {e.strerror or e}") from e
        with file:
            return open_rgb(self.name(index), file), int(label)

    def name(self, index: int) -> str:
        """The path of an image, or its number where it has none."""
        if isinstance(self.source, ImageFolder):
            return str(self.source.samples[index][0])
        try:
            return str(self.source.filename(index, absolute=True))
        except (AttributeError, NotImplementedError):
            return f"image {index}"


class Stream(IterableDataset[Sample]):
    """The transformed images of a source that is read from beginning to end, such as shards on a server.

    In validation every rank reads all images and keeps its share, so that each is scored once whatever the shard sizes.
    """

    def __init__(self, source: Any, transform: Any, world: World, seed: int = 0, training: bool = False) -> None:
        self.source, self.transform, self.seed, self.training = source, transform, seed, training
        self.rank, self.ranks = world.rank, world.size
        self.epoch = 0
        if not training:
            source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1

    def keep_decoded(self, shorter_side: int) -> None:
        """As of `Samples`, which a stream cannot do."""
        raise DataError("--cache-images needs images in files; this is a stream")

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number_of_worker, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, (image, label) in enumerate(self.source):
            index = number * workers + number_of_worker
            if not self.training and number % self.ranks != self.rank:
                continue
            with seeded(self.seed, self.epoch, index * self.ranks + self.rank):
                sample = Sample(self.transform(image), int(label), index, ())
            yield sample

    def name(self, index: int) -> str:
        return f"image {index} of the stream"


class seeded:
    """Inside, torch's random numbers follow from (seed, epoch, position); afterwards the generator is as before."""

    def __init__(self, seed: int, epoch: int, position: int) -> None:
        # SplitMix64's increment and multiplier: seeds of neighbours are independent of each other.
        x = (seed + 0x9E3779B97F4A7C15 * (epoch * 0x100000000 + position + 1)) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        self.seed = x ^ (x >> 27)

    def __enter__(self) -> None:
        self.before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.default_generator.set_state(self.before)


def samples_of(source: Any, transform: Any, world: World, seed: int = 0, training: bool = False) -> Samples | Stream:
    """The transformed images of a dataset of torchvision or timm, of either kind."""
    if isinstance(source, IterableDataset):
        return Stream(source, transform, world, seed, training)
    return Samples(source, transform, seed, training)
