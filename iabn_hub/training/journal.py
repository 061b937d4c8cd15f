"""What a run tells: a bar and lines on the screen, `train.log`, `metrics.csv`, TensorBoard and `report.html`.

Only the first process writes and speaks.
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

from ..checkpoints.export import write_atomically
from ..processes import Processes
from .report import training_report

Row = dict[str, float]
SILENCE = 60  # seconds without a line at most, where there is no bar


class Journal:
    """The records of one run in the folder `out`.

    Args:
        images: of the whole run, for the bar and the time left.
        step: where the run goes on; what TensorBoard has from later steps of an earlier attempt is hidden.
    """

    def __init__(self, out: Path, processes: Processes, images: int, done: int, step: int) -> None:
        self.out = out
        self.first = processes.first
        self.device = processes.device
        self.logger = logging.getLogger("iabn_hub.training")
        self.handlers: list[logging.Handler] = []
        self.images, self.done, self.done_before = images, done, done
        self.started = self.spoken = time.monotonic()
        if not self.first:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.handlers = [logging.FileHandler(out / "train.log", encoding="utf-8"), _Screen()]
        self.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        for handler in self.handlers:
            self.logger.addHandler(handler)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=images, initial=done, unit="image", unit_scale=True, disable=None, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """One line on the screen and, with the time, in the log."""
        if self.first:
            self.logger.info(text)

    def progress(self, images: int, epoch: int, loss: float) -> None:
        """So many more images were trained on."""
        if self.first:
            self.bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", refresh=False)
            self.bar.update(images)
            self.done += images
            if self.bar.disable and time.monotonic() - self.spoken > SILENCE:
                self.spoken = time.monotonic()
                speed = (self.done - self.done_before) / (self.spoken - self.started)
                left = tqdm.format_interval((self.images - self.done) / speed)
                self.say(
                    f"epoch {epoch}  {self.done:,} of {self.images:,} images  {speed:.0f} images/s  loss {loss:.3f}  "
                    f"{left} left"
                )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points for TensorBoard's curves."""
        if self.first:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def pictures(self, pictures: Sequence[np.ndarray], step: int) -> None:
        """Pictures for TensorBoard, (H, W, 3) uint8."""
        if self.first:
            for number, picture in enumerate(pictures):
                self.board.add_image(f"validation/{number}", picture, step, dataformats="HWC")

    def epochs(self, rows: Sequence[Row]) -> None:
        """Write the table of all epochs so far."""
        if self.first:
            text = io.StringIO()
            table = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            write_atomically(self.out / "metrics.csv", text.getvalue().encode())

    def report(self, title: str, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
        """Write the page with the curves."""
        if self.first:
            write_atomically(self.out / "report.html", training_report(title, rows, facts).encode())

    def flush(self) -> None:
        """Write out what TensorBoard's file still lacks: a run that goes on does not tell it again."""
        if self.first:
            self.board.flush()

    def peak_memory(self) -> int:
        """The most bytes that this process has used: of the GPU, or of the machine's memory without one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes * (1 if sys.platform == "darwin" else 1024)

    def close(self) -> None:
        """Let go of the files."""
        if self.first:
            self.bar.close()
            self.board.close()
            for handler in self.handlers:
                self.logger.removeHandler(handler)
                handler.close()


class _Screen(logging.Handler):
    """Lines above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class Clock:
    """Seconds of an epoch, and those of them that passed waiting for images."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0

    def next(self, batches: Any) -> Any:
        """The next of `batches`, on the clock."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.started
