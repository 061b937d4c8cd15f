"""Verify files by md5, and remember the result, so that a list of all files need not read them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..files import md5_of
from .errors import CheckpointError, ChecksumError


def is_verified(path: Path, md5: str, reread: bool = False) -> bool:
    """Whether `path` is a cached file with this md5.

    Args:
        reread: read all of it, as before it is used. Else a note that it was checked before will do, for lists.
    """
    if not path.is_file():
        return False
    if reread:
        return recheck(path) == md5
    with contextlib.suppress(OSError):
        if _note(path).read_text().split() == [md5, *_stamp(path)]:
            return True
    return recheck(path) == md5


def recheck(path: Path) -> str:
    """The md5 of a cached file, read again; from now on the note says this, whatever it said."""
    found = md5_of(path)
    remember(path, found)
    return found


def remember(path: Path, md5: str) -> None:
    """Note that `path` has this md5 as long as its size and time of change stay the same."""
    with contextlib.suppress(OSError):  # a read-only cache is hashed for each list instead
        _note(path).write_text(" ".join([md5, *_stamp(path)]) + "\n")


def noted_size(path: Path, md5: str) -> int | None:
    """The size in bytes of a file with this md5 that was at `path` before, where that is known."""
    with contextlib.suppress(OSError, ValueError):
        noted, size, _ = _note(path).read_text().split()
        return int(size) if noted == md5 else None
    return None


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".md5")


def _stamp(path: Path) -> tuple[str, str]:
    stat = path.stat()
    return str(stat.st_size), str(stat.st_mtime_ns)


def require_md5(path: Path, md5: str, name: str, way_out: str) -> Path:
    """The path of a file of the user's that has this md5.

    Args:
        name: of the checkpoint that it must be.
        way_out: what to do about a wrong file, for the message.

    Raises:
        CheckpointError: it does not exist.
        ChecksumError: it has another md5.
    """
    if not path.is_file():
        raise CheckpointError(f"{name}: {path}: there is no such file")
    found = md5_of(path)
    if found != md5:
        raise ChecksumError(f"{name}: {path} has md5 {found}, expected {md5}. It was not used: {way_out}")
    return path
