"""From folders, tar files, shards or a dataset's name to batches that depend on seed and position alone.

Every image is varied with random numbers of its own, drawn from (seed, epoch, position). So neither the number of
workers nor a restart in the middle of an epoch changes what the network sees.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm.data
import torch
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.datasets import ImageFolder

from ..images import ImageError, open_rgb
from ..processes import Processes
from .transforms import Transform

MODEST = 19  # niceness of workers that share the cores with the network: they take what its threads leave idle
SUBSTITUTES = 10  # images tried in a broken one's place
Key = tuple[int, int, int]  # epoch, position in the epoch, index


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


class Sample(NamedTuple):
    """One image, (3, H, W) or (10, 3, H, W) uint8, or None; its class and number; the broken files met on the way."""

    image: Tensor | None
    label: int
    number: int
    broken: tuple[str, ...]


class Batch(NamedTuple):
    """(N, 3, H, W) or (N, 10, 3, H, W) uint8; labels and indices (N,) int64; reasons of the files that were skipped."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    broken: tuple[str, ...]


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
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: expected {root}/train/CLASS/* and {root}/val/CLASS/*")
    # Not timm's reader: its order of the classes is another one, and leaves of the same name become one class.
    return ImageFolder(str(folder))


def classes_of(dataset: Any) -> tuple[str, ...] | None:
    """The names of its classes in the order of the labels; None where it does not know them."""
    reader = getattr(dataset, "reader", dataset)
    numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return tuple(sorted(numbers, key=lambda name: int(numbers[name]))) if numbers else None


def check_alike(location: Location, train: Any, val: Any) -> None:
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


class Samples(Dataset[Sample]):
    """The images of a dataset that can be read in any order. A key is (epoch, position, index)."""

    def __init__(self, source: Any, transform: Transform, seed: int, training: bool) -> None:
        self.source, self.transform, self.seed, self.training = source, transform, seed, training

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        """The image, or in training the next one that can be read, of so many; else none."""
        epoch, position, index = key
        broken: list[str] = []
        for attempt in range(SUBSTITUTES if self.training else 1):
            at = (index + attempt) % len(self.source)
            try:
                image, label = self._read(at)
            except ImageError as e:
                broken.append(str(e))
                continue
            with _random_numbers(self.seed, epoch, position):
                return Sample(self.transform(image), label, at, tuple(broken))
        return Sample(None, 0, index, tuple(broken))

    def _read(self, index: int) -> tuple[Any, int]:
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
    """The images of a dataset that is read from its beginning to its end, such as shards on a server.

    Validation is read whole by every process, and each keeps its share: exact, whatever the sizes of the shards.
    """

    def __init__(self, source: Any, transform: Transform, seed: int, training: bool, processes: Processes) -> None:
        self.source, self.transform, self.seed, self.training = source, transform, seed, training
        self.rank, self.count = processes.rank, processes.count
        self.epoch = 0
        if not training:
            source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        of_worker = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, (image, label) in enumerate(self.source):
            index = number * of_worker[1] + of_worker[0]
            if not self.training and number % self.count != self.rank:
                continue
            with _random_numbers(self.seed, self.epoch, index * self.count + self.rank):
                sample = Sample(self.transform(image), int(label), index, ())
            yield sample

    def name(self, index: int) -> str:
        return f"image {index} of the stream"


class _random_numbers:
    """Within, torch draws from (seed, epoch, position); afterwards it goes on where it was."""

    def __init__(self, seed: int, epoch: int, position: int) -> None:
        # SplitMix64's increment and multiplier: neighbours get numbers that have nothing to do with one another.
        x = (seed + 0x9E3779B97F4A7C15 * (epoch * 0x100000000 + position + 1)) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        self.seed = x ^ (x >> 27)

    def __enter__(self) -> None:
        self.before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.default_generator.set_state(self.before)


class TrainBatches(Sampler[list[Key]]):
    """The keys of one epoch, a micro-batch at a time, for this process; the rest that fills no batch is left out.

    The images of an epoch are shuffled alike everywhere, cut into batches, and each batch is shared among processes and
    passes.

    Args:
        batch_size: images a step, over all processes and passes.
        passes: micro-batches a step.
        repeats: how often an image comes in a row, in batches of as many images as ever (Hoffer et al., 2020).
    """

    def __init__(
        self, images: int, batch_size: int, passes: int, repeats: int, seed: int, processes: Processes
    ) -> None:
        self.images, self.batch_size, self.passes, self.repeats = images, batch_size, passes, repeats
        self.seed, self.rank, self.count = seed, processes.rank, processes.count
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return (self.images // self.batch_size - self.first_step) * self.passes

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.images, generator=generator).repeat_interleave(self.repeats).tolist()
        micro = self.batch_size // self.passes
        for first in range(self.first_step * self.batch_size, self.images - self.batch_size + 1, self.batch_size):
            for start in range(first, first + self.batch_size, micro):
                mine = range(start + self.rank, start + micro, self.count)
                yield [(self.epoch, position, order[position]) for position in mine]


def collate(samples: list[Sample]) -> Batch:
    """A batch of the images that could be read."""
    there = [sample for sample in samples if sample.image is not None]
    return Batch(
        torch.stack([s.image for s in there if s.image is not None]) if there else torch.empty(0, 3, 1, 1),
        torch.tensor([s.label for s in there], dtype=torch.long),
        torch.tensor([s.number for s in there], dtype=torch.long),
        tuple(reason for sample in samples for reason in sample.broken),
    )


def _loader_options(workers: int, processes: Processes) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": collate,
        "worker_init_fn": _start_modest_worker if processes.device.type == "cpu" else _start_worker,
        "pin_memory": processes.device.type == "cuda",
    }


def _start_worker(_: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach the whole group; the main process decides, and ends its workers itself. One
    # that hangs ends half a minute later.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def _start_modest_worker(number: int) -> None:
    _start_worker(number)
    os.nice(MODEST)


class TrainLoader:
    """The training batches of any epoch, from any step on.

    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(
        self,
        source: Any,
        transform: Transform,
        batch_size: int,
        passes: int,
        repeats: int,
        seed: int,
        workers: int,
        processes: Processes,
    ) -> None:
        images = len(source)
        self.steps = images // batch_size
        if self.steps == 0:
            raise DataError(
                f"there are {images} training images, fewer than one batch of {batch_size}: pass a smaller --batch-size"
            )
        self.images, self.passes, self.seed = images, passes, seed
        self.micro = batch_size // passes // processes.count
        self.order = torch.Generator()  # for what the loader draws: the caller's random numbers are left alone
        self.stream: Stream | None = None
        if isinstance(source, IterableDataset):
            workers = max(workers, 1)  # each epoch's are new, while a reader in this process would keep its state
            options = _loader_options(workers, processes)
            self.stream = Stream(source, transform, seed, True, processes)
            source.set_loader_cfg(workers)  # type: ignore[attr-defined]
            self.loader = DataLoader(self.stream, self.micro, drop_last=True, generator=self.order, **options)
            return
        self.batches = TrainBatches(images, batch_size, passes, repeats, seed, processes)
        self.loader = DataLoader(
            Samples(source, transform, seed, True),
            batch_sampler=self.batches,
            generator=self.order,
            persistent_workers=workers > 0,
            **_loader_options(workers, processes),
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The micro-batches from `first_step` on. Those of a stream that come before are read and left out.

        Raises:
            DataError: too many images in a row cannot be read; a stream is shorter than it should be.
        """
        if self.stream is None:
            self.batches.epoch, self.batches.first_step = epoch, first_step
            for batch in self.loader:
                if len(batch.labels) < self.micro:
                    raise DataError(f"{SUBSTITUTES} images in a row cannot be read; the last one: {batch.broken[-1]}")
                yield batch
            return
        self.stream.epoch = epoch
        self.stream.source.set_epoch(epoch)
        self.order.manual_seed(self.seed * 1_000_003 + epoch)
        wanted, given = self.steps * self.passes, 0
        for given, batch in enumerate(self.loader, start=1):
            if given > first_step * self.passes:
                yield batch
            if given == wanted:
                return
        raise DataError(
            f"the stream ended after {given // self.passes} of {self.steps} steps: say how many images it holds with "
            "--train-samples"
        )


def val_loader(source: Any, transform: Transform, batch_size: int, workers: int, processes: Processes) -> Any:
    """A loader of this process's share of the images, each of them exactly once over all processes."""
    options = {**_loader_options(workers, processes), "generator": torch.Generator()}
    if isinstance(source, IterableDataset):
        source.set_loader_cfg(workers)  # type: ignore[attr-defined]
        return DataLoader(Stream(source, transform, 0, False, processes), batch_size, **options)
    mine = [(0, i, i) for i in range(processes.rank, len(source), processes.count)]
    samples = Samples(source, transform, 0, False)
    return DataLoader(samples, batch_size, sampler=mine, persistent_workers=workers > 0, **options)
