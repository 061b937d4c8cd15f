"""iabn-hub verify: read cached checkpoints or a mirror again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..checkpoints.catalogue import records
from ..checkpoints.fetch import cached_files, local_file
from ..checkpoints.verify import recheck
from ..files import md5_of
from ..models.pretrained import find_checkpoint
from ..publishing.mirror import verify_mirror
from .frame import FAILED, OK, complete_names, json_option, print_json


@click.command("verify")
@click.argument("names", metavar="[NAME]…", nargs=-1, shell_complete=complete_names)
@click.option("--mirror", type=click.Path(path_type=Path), metavar="DIR", help="Check a mirror instead of the cache.")
@json_option
def command(names: tuple[str, ...], mirror: Path | None, as_json: bool) -> int:
    """Check the md5 of cached checkpoints, or of a mirror.

    Reads the files again and compares with the published md5.

    NAME is model or model.tag; without names, all cached checkpoints are checked.
    """
    rows = _verify_cached(names) if mirror is None else verify_mirror(mirror)
    way_out = "'iabn-hub fetch {}' downloads it" if mirror is None else "'iabn-hub mirror DIR {}' adds it"
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            wrong = row["status"] == "wrong"
            detail = f": md5 {row['md5']}, expected {row['expected_md5']}; delete it" if wrong else ""
            hint = f"; {way_out.format(row['name'])}" if row["status"] != "ok" else ""
            print(f"{row['status']:<8} {row['name']}  {row['path']}{detail}{hint}")
    return OK if all(row["status"] == "ok" for row in rows) else FAILED


def _verify_cached(names: tuple[str, ...]) -> list[dict[str, Any]]:
    wanted = [find_checkpoint(name) for name in names] or list(records().values())
    rows = []
    for record in wanted:
        local = local_file(record)
        files = [(local, record.md5)] if local else cached_files(record)
        present = [(path, md5) for path, md5 in files if path.is_file()]
        if not present and names:
            rows.append({"name": record.name, "status": "missing", "path": str(files[0][0])})
        for path, md5 in present:
            found = md5_of(path) if local else recheck(path)
            status = "ok" if found == md5 else "wrong"
            rows.append({"name": record.name, "status": status, "path": str(path), "expected_md5": md5, "md5": found})
    return rows
