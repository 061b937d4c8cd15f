"""iabn-hub fetch: download checkpoints into the cache."""

from __future__ import annotations

from typing import Any

import click

from ..checkpoints.errors import CheckpointError
from ..checkpoints.fetch import fetch_checkpoint
from ..models.pretrained import find_checkpoint
from .frame import FAILED, OK, complain, complete_names, json_option, print_json


@click.command("fetch")
@click.argument("names", metavar="NAME…", nargs=-1, required=True, shell_complete=complete_names)
@json_option
def command(names: tuple[str, ...], as_json: bool) -> int:
    """Download checkpoints into the cache and verify their md5. NAME is model or model.tag."""
    wanted = [find_checkpoint(name) for name in names]  # a mistyped name ends it before the first download
    rows: list[dict[str, Any]] = []
    for record in wanted:
        try:
            path = fetch_checkpoint(record)
            rows.append({"name": record.name, "path": str(path), "bytes": path.stat().st_size})
            if not as_json:
                print(f"{record.name}  {path}  {path.stat().st_size:,} bytes, md5 verified")
        except CheckpointError as e:
            rows.append({"name": record.name, "error": str(e)})
            complain(e)
    if as_json:
        print_json(rows)
    return FAILED if any("error" in row for row in rows) else OK
