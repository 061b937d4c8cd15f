"""Files that are whole or not there: atomic writing, digests, and a lock between processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock


class LockTimeoutError(TimeoutError):
    """Another process has held a lock for longer than this one waits."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader never sees a part of it, and a failure leaves the old file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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


@contextlib.contextmanager
def locked(target: Path, timeout: float) -> Iterator[None]:
    """Hold `<target>.lock`, so that one process at a time makes `target`; its folder is made if missing.

    Raises:
        LockTimeoutError: another process has held it for `timeout` seconds.
        OSError: the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{target}.lock", timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout as e:
        raise LockTimeoutError(f"another process has held {e.lock_file} for {timeout:.0f} s") from e
    try:
        yield
    finally:
        lock.release()
