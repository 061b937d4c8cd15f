"""The command that builds a mirror: `tools/make_mirror.py DIR`, a folder for any static web server.

`IABN_HUB_MIRROR` takes its URL, or `file://` and its path. `iabn-hub verify --mirror DIR` reads it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoints.catalogue import Checkpoint, find, records
from ..checkpoints.errors import CheckpointError, UnknownNameError
from ..checkpoints.export import write_atomically
from ..checkpoints.fetch import cached_files, fetch_checkpoint, local_file
from ..checkpoints.mirrors import INDEX
from ..checkpoints.verify import md5_of
from ..commands import FAILED, INTERRUPTED, OK, USAGE, complain

PROGRAM = "make_mirror.py"
DESCRIPTION = """Build a mirror: a folder with verified checkpoints under the names that IABN_HUB_MIRROR looks for.

Any static web server can serve it, for machines that cannot reach the internet; or mount it, and set
IABN_HUB_MIRROR=file:///path/of/DIR. What is there already and whole is kept, so the same command goes on where it was
stopped, and brings a mirror up to date. 'iabn-hub verify --mirror DIR' reads it again."""
EXAMPLES = """examples:
  python tools/make_mirror.py /srv/mirror
  python tools/make_mirror.py /srv/mirror resnext101_iabn resnet50_iabn
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", metavar="DIR", type=Path, help="made if missing")
    p.add_argument("names", metavar="MODEL[.TAG]", nargs="*", help="default: every checkpoint of the catalogue")
    p.add_argument("--json", action="store_true", help="print JSON for a program instead of text for a person")
    return p


def main(argv: list[str] | None = None) -> int:
    """Build; returns the exit code: 0 fine, 1 some are missing, 2 wrong usage."""
    arguments = parser().parse_args(argv)
    try:
        chosen = [find(name) for name in arguments.names] or list(records().values())
        rows = build(arguments.folder, chosen)
    except UnknownNameError as e:
        return complain(PROGRAM, e, USAGE)
    except (CheckpointError, OSError) as e:
        return complain(PROGRAM, e, FAILED)
    except KeyboardInterrupt:
        return complain(PROGRAM, "interrupted; what is there is whole, the same command goes on", INTERRUPTED)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"{row['file']}  {row['bytes']:,} bytes  md5 {row['md5']}" if "file" in row else
                  f"{row['name']}: {row.get('skipped') or row['error']}")  # fmt: skip
        print(f"{arguments.folder}: export IABN_HUB_MIRROR=file://{arguments.folder.resolve()}, or its URL")
    return FAILED if any("error" in row for row in rows) else OK


def build(folder: Path, chosen: Iterable[Checkpoint]) -> list[dict[str, Any]]:
    """Put every checkpoint into the mirror that is not there yet; returns a row for each.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for record in chosen:
        print(f"{record.name} …", file=sys.stderr)
        try:
            rows.append(_add(folder, record))
        except CheckpointError as e:
            rows.append({"name": record.name, "error": str(e)})
            complain(PROGRAM, e, FAILED)
    _write_index(folder, rows)
    return rows


def _add(folder: Path, record: Checkpoint) -> dict[str, Any]:
    if local_file(record):
        return {"name": record.name, "skipped": "comes with its catalogue, no mirror is asked for it"}
    for path, md5 in cached_files(record, folder):  # a mirror's names are those of a cache
        if path.is_file() and md5_of(path) == md5:
            return _row(record, path, md5)
    fetched = fetch_checkpoint(record)
    md5 = dict(cached_files(record))[fetched]
    target = folder / fetched.name
    part = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(fetched, part)
        if md5_of(part) != md5:
            raise CheckpointError(f"{part}: is not what was copied from {fetched}: is the disk sound?")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return _row(record, target, md5)


def _row(record: Checkpoint, path: Path, md5: str) -> dict[str, Any]:
    return {
        "name": record.name, "file": path.name, "bytes": path.stat().st_size, "md5": md5, "license": record.license,
        "license_link": record.license_link,
    }  # fmt: skip


def _write_index(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The list of what is there: these rows, and those of earlier commands whose files are still there."""
    index = folder / INDEX
    earlier = json.loads(index.read_text())["checkpoints"] if index.is_file() else []
    files = {row["file"]: row for row in (*earlier, *rows) if "file" in row and (folder / row["file"]).is_file()}
    content = {"checkpoints": [files[name] for name in sorted(files)]}
    write_atomically(index, (json.dumps(content, indent=1) + "\n").encode())
