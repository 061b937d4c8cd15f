"""iabn-hub verify: read cached checkpoints or a mirror again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..checkpoints.catalogue import records
from ..checkpoints.fetch import cached_files, local_file
from ..checkpoints.verify import difference, digests_of, recheck
from ..files import Digests
from ..models.pretrained import find_checkpoint
from ..publishing.mirror import verified_row, verify_mirror
from ..signing import Publisher, SignatureError
from ..signing import verify as verify_signature
from .frame import FAILED, OK, complete_names, json_option, print_json


@click.command("verify")
@click.argument("names", metavar="[NAME]…", nargs=-1, shell_complete=complete_names)
@click.option("--mirror", type=click.Path(path_type=Path), metavar="DIR", help="Check a mirror instead of the cache.")
@click.option("--signature", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="KEY",
              help="Check the signature of folders, with this public key (PEM).")  # fmt: skip
@click.option(
    "--as",
    "signed_as",
    metavar="NAME",
    help="What the folder must be signed as: ORG/NAME (default: its own name, of any ORG).",
)
@click.option("--minimum", type=click.IntRange(min=0), default=0, metavar="N", help="The oldest release that is taken.")
@json_option
def command(
    names: tuple[str, ...],
    mirror: Path | None,
    signature: Path | None,
    signed_as: str | None,
    minimum: int,
    as_json: bool,
) -> int:
    """Check the digests of cached checkpoints, or of a mirror, or the signature of exported folders.

    Reads the files again and compares with the published md5, and SHA-256 where it is known. A digest proves that a
    file is the published one. Who published it, only a signature proves: with --signature, NAME is a folder that
    'iabn-hub export --sign' wrote, of which no file may be changed, added or missing, but for the .gitattributes and
    .cache of the Hub.

    NAME is model or model.tag; without names, all cached checkpoints are checked.

    \b
    Examples:
      iabn-hub verify
      iabn-hub verify export/resnext101_iabn.lr_512_in1k --signature key.pub --minimum 3
    """
    if signature is None and (signed_as or minimum):
        raise click.UsageError("--as and --minimum are for --signature")
    if signature is not None and mirror is not None:
        raise click.UsageError("--signature is for folders, --mirror for mirrors: pass one of them")
    if signature is not None:
        return _verify_signatures(names, signature, signed_as, minimum, as_json)
    rows = _verify_cached(names) if mirror is None else verify_mirror(mirror)
    way_out = "'iabn-hub fetch {}' downloads it" if mirror is None else "'iabn-hub mirror DIR {}' adds it"
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            detail = f": {_wrong(row)}; delete it" if row["status"] == "wrong" else ""
            hint = f"; {way_out.format(row['name'])}" if row["status"] != "ok" else ""
            print(f"{row['status']:<8} {row['name']}  {row['path']}{detail}{hint}")
    return OK if all(row["status"] == "ok" for row in rows) else FAILED


def _wrong(row: dict[str, Any]) -> str:
    digests = (Digests(row[f"{kind}md5"], row.get(f"{kind}sha256") or "") for kind in ("", "expected_"))
    return difference(*digests)


def _verify_signatures(names: tuple[str, ...], key: Path, signed_as: str | None, minimum: int, as_json: bool) -> int:
    if not names:
        raise click.UsageError("name the folders whose signatures are to be checked")
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"name": name, "status": "ok"}
        try:
            expected = signed_as or Path(name).resolve().name
            row["release"] = verify_signature(Path(name), expected, Publisher(key, minimum))
        except SignatureError as e:
            row |= {"status": "wrong", "reason": str(e)}
        rows.append(row)
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            detail = row["reason"] if "reason" in row else f"{row['name']}, release {row['release']}"
            print(f"{row['status']:<8} {detail}")
    return OK if all(row["status"] == "ok" for row in rows) else FAILED


def _verify_cached(names: tuple[str, ...]) -> list[dict[str, Any]]:
    wanted = [find_checkpoint(name) for name in names] or list(records().values())
    rows = []
    for record in wanted:
        local = local_file(record)
        files = [(local, record.digests)] if local else cached_files(record)
        present = [(path, digests) for path, digests in files if path.is_file()]
        if not present and names:
            rows.append({"name": record.name, "status": "missing", "path": str(files[0][0])})
        for path, digests in present:
            found = digests_of(path, digests) if local else recheck(path, digests)
            rows.append(verified_row(record.name, path, digests, found))
    return rows
