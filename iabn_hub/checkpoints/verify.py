"""Whether a file has the md5 it must have, and a note that saves hashing it at each load."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path


def md5_of(path: Path) -> str:
    """The md5 of a file's bytes, in lowercase hexadecimal."""
    return _digest_of(path, "md5")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in lowercase hexadecimal."""
    return _digest_of(path, "sha256")


def _digest_of(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_verified(path: Path, md5: str) -> bool:
    """Whether `path` is a cached file with this md5; reads all of it unless a note says that it was checked before."""
    if not path.is_file():
        return False
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
    with contextlib.suppress(OSError):  # a read-only cache is hashed at each load instead
        _note(path).write_text(" ".join([md5, *_stamp(path)]) + "\n")


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".md5")


def _stamp(path: Path) -> tuple[str, str]:
    stat = path.stat()
    return str(stat.st_size), str(stat.st_mtime_ns)
