"""Whether a file has the md5 it must have, and a note beside it so that each load need not hash it again."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path


def md5_of(path: Path) -> str:
    """The md5 of a file's bytes, in lowercase hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_verified(path: Path, md5: str, *, rehash: bool = False) -> bool:
    """Whether `path` exists with this md5; reads all of it unless a note says that it was checked and not touched.

    Args:
        rehash: read the file even so.
    """
    if not path.is_file():
        return False
    note = _note(path)
    if not rehash:
        with contextlib.suppress(OSError):
            if note.read_text().split() == [md5, *_stamp(path)]:
                return True
    if md5_of(path) != md5:
        return False
    remember(path, md5)
    return True


def remember(path: Path, md5: str) -> None:
    """Note that `path` has this md5 as long as its size and time of change stay the same."""
    with contextlib.suppress(OSError):  # a read-only cache is hashed at each load instead
        _note(path).write_text(" ".join([md5, *_stamp(path)]) + "\n")


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".md5")


def _stamp(path: Path) -> tuple[str, str]:
    stat = path.stat()
    return str(stat.st_size), str(stat.st_mtime_ns)
