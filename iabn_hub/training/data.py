"""From the images of a split to batches that depend on seed and position alone.

Every image is varied with random numbers of its own, drawn from (seed, epoch, position). So neither the number of
workers nor a restart in the middle of an epoch changes what the network sees.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import timm.data
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.datasets import ImageFolder

from ..images import ImageError, open_rgb
from ..processes import Processes
from .splits import DataError
from .transforms import Transform

MODEST = 19  # niceness of workers that share the cores with the network: they take what its threads leave idle
SUBSTITUTES = 10  # images tried in a broken one's place


class Key(NamedTuple):
    """What is asked for: a place in an epoch, the image that stands there, and what it is there for.

    `focus` is the class that a crop of a scene is drawn around, or −1.
    """

    epoch: int
    position: int
    image: int
    focus: int = -1


class Sample(NamedTuple):
    """One image, (3, H, W) or (10, 3, H, W) uint8, or None; its class, or those of its pixels, (H, W) uint8; its
    number; the broken files met on the way."""

    image: Tensor | None
    label: int | Tensor
    number: int
    broken: tuple[str, ...]


class Batch(NamedTuple):
    """(N, 3, H, W) or (N, 10, 3, H, W) uint8; labels (N,) int64, or (N, H, W) uint8; indices (N,) int64; reasons of the
    files that were skipped."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    broken: tuple[str, ...]


class Samples(Dataset[Sample]):
    """The images of a dataset that can be read in any order."""

    def __init__(self, source: Any, transform: Any, seed: int, training: bool) -> None:
        self.source, self.transform, self.seed, self.training = source, transform, seed, training

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        """The image, or in training the next one that can be read, of so many; else none."""
        epoch, position, index, focus = key
        broken: list[str] = []
        for attempt in range(SUBSTITUTES if self.training else 1):
            at = (index + attempt) % len(self.source)
            try:
                image, label = self._read(at)
            except ImageError as e:
                broken.append(str(e))
                continue
            with _random_numbers(self.seed, epoch, position):
                return Sample(*self._vary(image, label, focus), at, tuple(broken))
        return Sample(None, 0, index, tuple(broken))

    def _vary(self, image: Any, label: Any, focus: int) -> tuple[Tensor, int | Tensor]:
        return self.transform(image), label

    def order(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """Index and focus of the images of an epoch."""
        return [(index, -1) for index in torch.randperm(len(self.source), generator=generator).tolist()]

    def _read(self, index: int) -> tuple[Any, Any]:
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
        samples: give the order of the images.
        batch_size: images a step, over all processes and passes.
        passes: micro-batches a step.
        repeats: how often an image comes in a row, in batches of as many images as ever (Hoffer et al., 2020).
    """

    def __init__(
        self, samples: Samples, batch_size: int, passes: int, repeats: int, seed: int, processes: Processes
    ) -> None:
        self.samples, self.batch_size, self.passes, self.repeats = samples, batch_size, passes, repeats
        self.images = len(samples)
        self.seed, self.rank, self.count = seed, processes.rank, processes.count
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return (self.images // self.batch_size - self.first_step) * self.passes

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = [each for each in self.samples.order(generator) for _ in range(self.repeats)]
        micro = self.batch_size // self.passes
        for first in range(self.first_step * self.batch_size, self.images - self.batch_size + 1, self.batch_size):
            for start in range(first, first + self.batch_size, micro):
                mine = range(start + self.rank, start + micro, self.count)
                yield [Key(self.epoch, position, *order[position]) for position in mine]


def collate(samples: list[Sample]) -> Batch:
    """A batch of the images that could be read."""
    there = [sample for sample in samples if sample.image is not None]
    return Batch(
        torch.stack([s.image for s in there if s.image is not None]) if there else torch.empty(0, 3, 1, 1),
        torch.stack([torch.as_tensor(s.label) for s in there]) if there else torch.empty(0, dtype=torch.long),
        torch.tensor([s.number for s in there], dtype=torch.long),
        tuple(reason for sample in samples for reason in sample.broken),
    )


def _loader_options(workers: int, processes: Processes) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": collate,
        "worker_init_fn": _start_modest_worker if processes.device.type == "cpu" else start_worker,
        "pin_memory": processes.device.type == "cuda",
    }


def start_worker(_: int) -> None:
    """What every process that reads images does first."""
    # Ctrl-C and a cluster's SIGTERM reach the whole group; the main process decides, and ends its workers itself. One
    # that hangs ends half a minute later.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def _start_modest_worker(number: int) -> None:
    start_worker(number)
    os.nice(MODEST)


class TrainLoader:
    """The training batches of any epoch, from any step on.

    Args:
        samples: what makes samples of the source, where that is not a stream.

    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(
        self,
        source: Any,
        transform: Any,
        batch_size: int,
        passes: int,
        repeats: int,
        seed: int,
        workers: int,
        processes: Processes,
        samples: type[Samples] = Samples,
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
        those = samples(source, transform, seed, True)
        self.batches = TrainBatches(those, batch_size, passes, repeats, seed, processes)
        self.loader = DataLoader(
            those,
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


def val_loader(
    source: Any,
    transform: Any,
    batch_size: int,
    workers: int,
    processes: Processes,
    samples: type[Samples] = Samples,
) -> Any:
    """A loader of this process's share of the images, each of them exactly once over all processes."""
    options = {**_loader_options(workers, processes), "generator": torch.Generator()}
    if isinstance(source, IterableDataset):
        source.set_loader_cfg(workers)  # type: ignore[attr-defined]
        return DataLoader(Stream(source, transform, 0, False, processes), batch_size, **options)
    mine = [Key(0, i, i) for i in range(processes.rank, len(source), processes.count)]
    those = samples(source, transform, 0, False)
    return DataLoader(those, batch_size, sampler=mine, persistent_workers=workers > 0, **options)
