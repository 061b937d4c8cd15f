"""Verify files by md5, and by SHA-256 where it is known, and remember the result, so that a list need not read them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..files import Digests, md5_of, sha256_of
from .errors import CheckpointError, ChecksumError


def difference(path: Path, expected: Digests) -> str:
    """'' if a file has these digests, else what it has: 'md5 …, expected …'."""
    found = md5_of(path)
    if found != expected.md5:
        return f"md5 {found}, expected {expected.md5}"
    if expected.sha256:
        found = sha256_of(path)
        if found != expected.sha256:
            return f"the right md5, but SHA-256 {found}, expected {expected.sha256}"
    return ""


def is_verified(path: Path, expected: Digests, reread: bool = False) -> bool:
    """Whether `path` is a cached file with these digests.

    Args:
        reread: read all of it, as before it is used. Else a note that it was checked before will do, for lists.
    """
    if not path.is_file():
        return False
    if not reread:
        with contextlib.suppress(OSError):
            if _note(path).read_text().split() == [expected.md5, *_stamp(path)]:
                return True
    return not recheck(path, expected)


def recheck(path: Path, expected: Digests) -> str:
    """The `difference` of a cached file, read again; from now on the note says this, whatever it said."""
    wrong = difference(path, expected)
    remember(path, "wrong" if wrong else expected.md5)
    return wrong


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


def require_digests(path: Path, expected: Digests, name: str, way_out: str) -> Path:
    """The path of a file of the user's that has these digests.

    Args:
        name: of the checkpoint that it must be.
        way_out: what to do about a wrong file, for the message.

    Raises:
        CheckpointError: it does not exist.
        ChecksumError: it has others.
    """
    if not path.is_file():
        raise CheckpointError(f"{name}: {path}: there is no such file")
    wrong = difference(path, expected)
    if wrong:
        raise ChecksumError(f"{name}: {path} has {wrong}. It was not used: {way_out}")
    return path
