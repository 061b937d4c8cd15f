"""Snapshots of a run: complete or absent, of the last few steps and of the best epoch, read without running code."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.errors import CheckpointError
from ..checkpoints.weights import BEST, read_snapshot


class Snapshots:
    """The snapshots in a folder, `step-00001234.pt` and so on, and `best.pt`.

    Args:
        folder: made when the first is saved.
        keep: how many of the last ones are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: dict[str, Any], step: int, best: bool = False) -> Path:
        """Write `state` (tensors and plain values); then delete older snapshots, and those of later steps.

        Later steps belong to an attempt that was abandoned by resuming from an earlier snapshot.

        Raises:
            OSError: it cannot be written; the earlier snapshots stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        part = path.with_suffix(".partial")
        try:
            try:
                with part.open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            except RuntimeError as e:  # how torch.save reports a full disk
                raise OSError(f"{part}: cannot be written; is the disk full? ({str(e).splitlines()[0]})") from e
            if best:  # before it becomes the newest: a run that is killed here saves both again
                self._name_best(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        earlier = [each for each in self.all() if each.name <= path.name]
        for old in {*self.all()} - {*earlier[-self.keep :]} | {*self.folder.glob("*.partial")}:
            old.unlink(missing_ok=True)
        return path

    def _name_best(self, path: Path) -> None:
        link = self.folder / "best.partial"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)  # costs no space while both names are there
        except OSError:
            shutil.copyfile(path, link)
        os.replace(link, self.folder / BEST)

    def size(self) -> int:
        """Bytes on the disk that these snapshots take; a file with two names counts once."""
        files = [path.stat() for path in (*self.all(), self.folder / BEST) if path.exists()]
        return sum({stat.st_ino: stat.st_size for stat in files}.values())

    def all(self) -> list[Path]:
        """The snapshots by step, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest snapshot that can be read; None if there is none."""
        for path in reversed(self.all()):
            with contextlib.suppress(CheckpointError):
                return path, read_snapshot(path)
        return None

    def remove_all(self) -> None:
        """Delete every snapshot."""
        for path in (*self.all(), self.folder / BEST):
            path.unlink(missing_ok=True)
