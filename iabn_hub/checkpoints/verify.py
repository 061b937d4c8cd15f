"""Verify files by md5, and by SHA-256 where it is known, and remember the result, so that a list need not read them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..files import Digests, md5_of, sha256_of
from .errors import CheckpointError, ChecksumError


def digests_of(path: Path, expected: Digests) -> Digests:
    """The digests of a file, as many as are expected; SHA-256 is left out where the md5 is wrong already."""
    md5 = md5_of(path)
    return Digests(md5, sha256_of(path) if expected.sha256 and md5 == expected.md5 else "")


def difference(found: Digests, expected: Digests) -> str:
    """'' if a file is the expected one, else 'md5 …, expected …'."""
    if found.md5 != expected.md5:
        return f"md5 {found.md5}, expected {expected.md5}"
    if found.sha256 != expected.sha256:
        return f"the right md5, but SHA-256 {found.sha256}, expected {expected.sha256}"
    return ""


def mismatch(path: Path, expected: Digests) -> str:
    """The `difference` of a file, which is read."""
    return difference(digests_of(path, expected), expected)


def is_verified(path: Path, expected: Digests, reread: bool = False) -> bool:
    """Whether `path` is a cached file with these digests.

    Args:
        reread: read all of it, as before it is used. Else a note that it was checked before will do, for lists.
    """
    if not path.is_file():
        return False
    if not reread:
        with contextlib.suppress(OSError):
            if _note(path).read_text() == _noted(path, expected):
                return True
    return recheck(path, expected) == expected


def recheck(path: Path, expected: Digests) -> Digests:
    """The digests of a cached file, read again; from now on the note says these, whatever it said."""
    found = digests_of(path, expected)
    remember(path, found)
    return found


def remember(path: Path, digests: Digests) -> None:
    """Note that `path` has these digests as long as its size and time of change stay the same."""
    with contextlib.suppress(OSError):  # a read-only cache is hashed for each list instead
        _note(path).write_text(_noted(path, digests))


def noted_size(path: Path, md5: str) -> int | None:
    """The size in bytes of a file with this md5 that was at `path` before, where that is known."""
    with contextlib.suppress(OSError, ValueError):
        noted, size, *_ = _note(path).read_text().split()
        return int(size) if noted == md5 else None
    return None


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".md5")


def _noted(path: Path, digests: Digests) -> str:
    stat = path.stat()
    return f"{digests.md5} {stat.st_size} {stat.st_mtime_ns} {digests.sha256}".rstrip() + "\n"


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
    wrong = mismatch(path, expected)
    if wrong:
        raise ChecksumError(f"{name}: {path} has {wrong}. It was not used: {way_out}")
    return path
