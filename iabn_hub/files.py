"""Files that are whole or not there, and whose owner is trusted: atomic writing, digests, locks, permissions."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class LockTimeoutError(TimeoutError):
    """Another process has held a lock for longer than this one waits."""


class InUseError(ValueError):
    """Another process is writing into a folder; the message says which."""


class NoHomeError(RuntimeError):
    """There is no HOME, and the system does not know this user."""


class UntrustedError(PermissionError):
    """Another user owns a file, or can write it or replace it."""


def require_trusted(path: Path) -> None:
    """Make sure that only this user and root can change what is executed or shown from `path`.

    The file, if it exists, and the folders above it must belong to this user or to root, and no other user may write
    them. A folder with the sticky bit, such as /tmp, may be writable: its entries are safe from other users.

    Raises:
        UntrustedError: names the first place where this is not so.
    """
    if not hasattr(os, "getuid"):  # Windows: there is no such mode
        return
    path = path.absolute()
    for place in dict.fromkeys([path, *path.parents, path.resolve(), *path.resolve().parents]):
        try:
            found = place.lstat()
        except OSError:  # it is not there, or nothing can be read from it either
            continue
        # The mode of a link means nothing; its target is looked at as well.
        found_mode = 0 if stat.S_ISLNK(found.st_mode) else found.st_mode
        if found.st_uid not in (os.getuid(), 0):
            raise UntrustedError(f"{place} belongs to another user (number {found.st_uid})")
        own_group = found.st_gid == 0 or found.st_gid == os.getgid() == os.getuid()  # a group of this user alone
        writable = found_mode & stat.S_IWOTH or (found_mode & stat.S_IWGRP and not own_group)
        if writable and not (stat.S_ISDIR(found_mode) and found_mode & stat.S_ISVTX):
            raise UntrustedError(f"{place} can be written by other users (mode {stat.S_IMODE(found_mode):o})")


def expanded(path: str | os.PathLike[str], variable: str) -> Path:
    """A path whose ~ is the home folder of this user.

    Raises:
        NoHomeError: nobody knows that folder; `variable` is the one to set instead.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise NoHomeError(f"the home folder of this user is not known: set {variable} to a folder, or HOME") from e


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader never sees a part of it, and a failure leaves the old file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Digests(NamedTuple):
    """Of a file's bytes, in lowercase hexadecimal; `sha256` is '' where it is not known."""

    md5: str
    sha256: str = ""


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
    """Hold `<target>.lock`, so that one process at a time makes `target`.

    Its folder is made if missing, for this user alone.

    Raises:
        LockTimeoutError: another process has held it for `timeout` seconds.
        OSError: the folder cannot be written.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{target}.lock", timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout as e:
        raise LockTimeoutError(f"another process has held {e.lock_file} for {timeout:.0f} s") from e
    try:
        yield
    finally:
        lock.release()


FOLDER_LOCK = ".iabn_hub.lock"
LOCK_SECONDS = 3.0  # a process that was told to stop may take so long to close its files
_held: set[int] = set()  # descriptors of locks


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let no other process of this package write into `folder`, which is made if missing.

    The system releases the lock when this process ends, however it ends. Its file in the folder names the process, and
    is removed at the end; so is a folder that was made here and is empty. Where there are no locks (Windows, some file
    systems), nothing is locked.

    Raises:
        InUseError: another process holds it; says which, since when, and what to do.
        OSError: the folder cannot be written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FOLDER_LOCK
    started = time.monotonic()
    while (lock := _lock(path)) is None:
        if time.monotonic() - started > LOCK_SECONDS:
            owner = ""
            with contextlib.suppress(OSError):
                owner = path.read_text(errors="replace")[:500].strip()
            raise InUseError(
                f"{folder}: is in use by {owner or 'another process'}; wait for it, stop it, or name another folder"
            )
        time.sleep(0.05)
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, started {when}".encode())
        yield
    finally:
        if lock in _held:  # else this is a forked process
            path.unlink(missing_ok=True)
            _held.discard(lock)
            os.close(lock)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _lock(path: Path) -> int | None:
    """The descriptor of the locked file at `path`, or None if another process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        _flock(lock)
        if os.path.samestat(os.fstat(lock), path.lstat()):  # else its owner has just removed it
            _held.add(lock)
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _flock(lock: int) -> None:
    """Lock, unless the file system has no locks; raises BlockingIOError if another process holds it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def _close_locks() -> None:
    """In a forked process, such as a worker that reads images: a lock ends with the process that took it."""
    for lock in _held:
        os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)
