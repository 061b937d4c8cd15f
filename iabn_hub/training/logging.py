"""What a run logs: a progress bar and lines on the terminal, train.log, metrics.csv, TensorBoard and report.html.

Only rank 0 writes and prints.
"""

from __future__ import annotations

import csv
import io
import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..files import write_atomically
from ..terminal import Formatter, progress_bar
from ..world import World
from .report import training_report

Row = dict[str, float]
LINE_SECONDS = 60  # between lines of progress where there is no progress bar


class RunLogger:
    """The log of one run in the folder `out`.

    Args:
        images: of the whole run, for the progress bar and the time left.
        done: images of the steps before this start.
        step: where the run continues; TensorBoard hides events of later steps of an earlier attempt.
    """

    def __init__(self, out: Path, world: World, images: int, done: int, step: int) -> None:
        self.out = out
        self.first = world.is_primary
        self.device = world.device
        self.logger = logging.getLogger("iabn_hub.training")
        self.handlers: list[logging.Handler] = []
        self.images, self.done, self.done_before = images, done, done
        self.started = self.last_line = time.monotonic()
        if not self.first:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.handlers = [logging.FileHandler(out / "train.log", encoding="utf-8"), _Terminal()]
        self.handlers[0].setFormatter(Formatter("%(asctime)s %(message)s"))
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        for handler in self.handlers:
            self.logger.addHandler(handler)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.bar = progress_bar(total=images, initial=done, unit="image", unit_scale=True)

    def info(self, text: str) -> None:
        """One line on the terminal and, with the time, in train.log."""
        if self.first:
            self.logger.info(text)

    def progress(self, images: int, epoch: int, loss: float) -> None:
        """Report progress by so many images."""
        if self.first:
            self.bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", refresh=False)
            self.bar.update(images)
            self.done += images
            if self.bar.disable and time.monotonic() - self.last_line > LINE_SECONDS:
                self.last_line = time.monotonic()
                speed = (self.done - self.done_before) / (self.last_line - self.started)
                left = tqdm.format_interval((self.images - self.done) / speed)
                self.info(
                    f"epoch {epoch}  {self.done:,} of {self.images:,} images  {speed:.0f} images/s  loss {loss:.3f}  "
                    f"{left} left"
                )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Scalars for TensorBoard."""
        if self.first:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def pictures(self, pictures: Sequence[np.ndarray], step: int) -> None:
        """Pictures for TensorBoard, (H, W, 3) uint8."""
        if self.first:
            for number, picture in enumerate(pictures):
                self.board.add_image(f"validation/{number}", picture, step, dataformats="HWC")

    def epochs(self, rows: Sequence[Row]) -> None:
        """Write metrics.csv: all epochs so far."""
        if self.first:
            text = io.StringIO()
            table = csv.DictWriter(text, list(rows[-1]), restval="", extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            write_atomically(self.out / "metrics.csv", text.getvalue().encode())

    def report(
        self, title: str, rows: Sequence[Row], facts: Mapping[str, Any], figures: Mapping[str, bytes], errors: str
    ) -> None:
        """Write report.html; see `training_report`."""
        if self.first:
            write_atomically(self.out / "report.html", training_report(title, rows, facts, figures, errors).encode())

    def flush(self) -> None:
        """Write TensorBoard's buffered events: a resumed run does not log them again."""
        if self.first:
            self.board.flush()

    def peak_memory(self) -> int:
        """Peak memory of this process in bytes: of the GPU, or resident memory without one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes * (1 if sys.platform == "darwin" else 1024)

    def close(self) -> None:
        """Close the files."""
        if self.first:
            self.bar.close()
            self.board.close()
            for handler in self.handlers:
                self.logger.removeHandler(handler)
                handler.close()


class _Terminal(logging.Handler):
    """Lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class Clock:
    """Seconds of an epoch, and the seconds of it spent waiting for images."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0

    def next(self, batches: Any) -> Any:
        """The next of `batches`, timed."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def seconds(self) -> float:
        """Seconds since it was created."""
        return time.perf_counter() - self.started
