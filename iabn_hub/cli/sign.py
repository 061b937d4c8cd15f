"""iabn-hub sign: sign a folder, such as a catalogue."""

from __future__ import annotations

from pathlib import Path

import click

from ..files import FOLDER_LOCK
from ..signing import IGNORED, RELEASE, SIGNATURE, SignatureError, sign
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
    """Sign all files of a folder, into model.sig and release.json.

    A folder with a catalogue.json in it can be named in IABN_HUB_CATALOGUE. It is read only if NAME is listed among the
    publishers of whoever reads it ('iabn-hub doctor' shows them), and nothing was changed, added or removed. The
    records of a signed catalogue state the SHA-256 of each file, so that the signature holds for the weights as well.

    'iabn-hub export --sign' signs what it exports, 'iabn-hub verify --signature' checks a folder.

    \b
    Examples:
      iabn-hub sign catalogue/ --key key.pem --as my-org/catalogue --release 3
      iabn-hub verify catalogue/ --signature key.pub --as my-org/catalogue
    """
    left_out = {*IGNORED, RELEASE, SIGNATURE, FOLDER_LOCK}
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    chosen = [str(file) for file in files if file.parts[0] not in left_out]
    if not chosen:
        return complain(f"{folder}: holds no files to sign", FAILED)
    try:
        sign(folder, chosen, name, release, key)
    except SignatureError as e:
        return complain(e, FAILED)
    if as_json:
        print_json({"folder": str(folder), "name": name, "release": release, "files": chosen})
    else:
        print(f"{folder / SIGNATURE}: {len(chosen)} files, signed as {name}, release {release}")
    return OK
