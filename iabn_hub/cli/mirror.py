"""iabn-hub mirror: a folder of checkpoints for machines without internet."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..checkpoints.catalogue import Checkpoint, find, records
from ..publishing.mirror import build_mirror
from .frame import FAILED, OK, complain, complete_names, json_option, print_json


@click.command("mirror")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("names", metavar="[NAME]…", nargs=-1, shell_complete=complete_names)
@json_option
def command(folder: Path, names: tuple[str, ...], as_json: bool) -> int:
    """Build a mirror of the checkpoints.

    A mirror is a folder of verified files under the names that IABN_HUB_MIRROR looks for.

    NAME is model or model.tag; without names, all checkpoints are added. Any static web server can serve the folder,
    for machines that cannot reach the internet; or mount it, and set IABN_HUB_MIRROR=file:///path/of/DIR. Complete
    files are kept, so the same command continues where it was stopped, and updates a mirror.
    'iabn-hub verify --mirror DIR' reads it again.

    \b
    Examples:
      iabn-hub mirror /srv/mirror
      iabn-hub mirror /srv/mirror resnext101_iabn resnet50_iabn
    """
    rows = build_mirror(folder, [find(name) for name in names] or list(records().values()), _report)
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            stored = f"{row['file']}  {row['bytes']:,} bytes  md5 {row['md5']}" if "file" in row else ""
            print(stored or f"{row['name']}: {row.get('skipped') or row['error']}")
        print(f"{folder}: export IABN_HUB_MIRROR=file://{folder.resolve()}, or its URL")
    return FAILED if any("error" in row for row in rows) else OK


def _report(record: Checkpoint, error: str | None) -> None:
    if error:
        complain(error)
    else:
        print(f"{record.name} …", file=sys.stderr)
