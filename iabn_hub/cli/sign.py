"""iabn-hub sign: sign a catalogue."""

from __future__ import annotations

from pathlib import Path

import click

from ..checkpoints.catalogue import SIGNED, read_catalogue, require_sha256
from ..checkpoints.errors import CatalogueError
from ..signing import SIGNATURE, SignatureError, sign
from .frame import FAILED, OK, complain, json_option, print_json


@click.command("sign")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--key", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=True, metavar="KEY",
              help="The private key (PEM, ECDSA).")  # fmt: skip
@click.option("--as", "name", metavar="NAME", required=True, help="The name it is published under: ORG/NAME.")
@click.option("--release", type=click.IntRange(min=1), default=1, show_default=True,
              help="A number that grows with each release; it is signed.")  # fmt: skip
@json_option
def command(folder: Path, key: Path, name: str, release: int, as_json: bool) -> int:
    """Sign a catalogue: FOLDER/catalogue.json, into FOLDER/model.sig and FOLDER/release.json.

    IABN_HUB_CATALOGUE=FOLDER reads it. It is read only if NAME is among the publishers that the reader lists
    ('iabn-hub doctor' shows them), in a release that is not older than that list says, and unchanged. Its records state
    the SHA-256 of each file, so that the signature holds for the weights as well, wherever they come from.

    'iabn-hub export --sign' signs the folders of weights that it writes.

    \b
    Example:
      iabn-hub sign catalogue/ --key key.pem --as my-org/catalogue --release 3
    """
    try:
        found = read_catalogue(folder / SIGNED)
        require_sha256(found)
        sign(folder, [SIGNED], name, release, key)
    except (CatalogueError, SignatureError) as e:
        return complain(e, FAILED)
    if as_json:
        print_json({"folder": str(folder), "name": name, "release": release, "checkpoints": [r.name for r in found]})
    else:
        print(f"{folder / SIGNATURE}: {len(found)} checkpoints, signed as {name}, release {release}")
    return OK
