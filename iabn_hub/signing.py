"""Signatures of folders: who published them, and that no file was changed, added or left out.

They are those of OpenSSF's model-signing (a sigstore bundle in model.sig, with the SHA-256 of every file), made with an
ECDSA key. What is signed includes release.json, the name and number of the release, so that neither another publisher's
folder nor an older one of the same publisher can take its place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .files import FOLDER_LOCK, expanded, write_atomically
from .schema import load_json

SIGNATURE, RELEASE = "model.sig", "release.json"
VARIABLE = "IABN_HUB_PUBLISHERS"


class SignatureError(ValueError):
    """A folder is not what its publisher signed, or not signed by one that is trusted; the message says which."""


@dataclasses.dataclass(frozen=True)
class Publisher:
    """Who may sign a release.

    Attributes:
        key: file of the public key, PEM.
        minimum: the oldest release that is taken.
    """

    key: Path
    minimum: int = 0


def sign(folder: Path, name: str, release: int, private_key: Path) -> None:
    """Write release.json and model.sig into a folder; a signature that is right already stays as it is.

    Raises:
        SignatureError: the key cannot be read, or model-signing is not installed.
    """
    signing = _library()
    write_atomically(folder / RELEASE, json.dumps({"name": name, "release": release}, indent=1).encode() + b"\n")
    with tempfile.TemporaryDirectory() as place:
        public = Path(place) / "key.pub"
        public.write_bytes(_public_key(private_key))
        try:
            verify(folder, name, Publisher(public, release))
            return
        except SignatureError:
            (folder / SIGNATURE).unlink(missing_ok=True)
        written = Path(place) / SIGNATURE
        config = signing.signing.Config().use_elliptic_key_signer(private_key=private_key)
        config.set_hashing_config(_hashing(folder)).sign(folder, written)
        write_atomically(folder / SIGNATURE, written.read_bytes())


def verify(folder: Path, name: str, publisher: Publisher) -> int:
    """The number of the release in a folder, if it is complete, unchanged, and signed by that publisher.

    Args:
        name: of what was asked for.

    Raises:
        SignatureError: it is not; says what is wrong.
    """
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise SignatureError(f"{folder} is not signed: there is no {SIGNATURE} in it")
    if not publisher.key.is_file():
        raise SignatureError(f"the public key {publisher.key} is missing")
    config = _library().verifying.Config().use_elliptic_key_verifier(public_key=publisher.key)
    try:
        config.set_hashing_config(_hashing(folder)).verify(folder, signature)
    except Exception as e:  # as many kinds as there are ways to be wrong
        raise SignatureError(f"{folder}: {_reason(str(e), publisher)}") from e
    signed = load_json(folder / RELEASE, SignatureError)
    found, release = (signed.get("name"), signed.get("release")) if isinstance(signed, dict) else (None, None)
    if found != name:
        raise SignatureError(f"{folder} is signed as {found!r}, not as {name!r}")
    if not isinstance(release, int) or release < publisher.minimum:
        raise SignatureError(
            f"{folder} is release {release} of {name}; the oldest that is taken is {publisher.minimum}"
        )
    return release


def _reason(text: str, publisher: Publisher) -> str:
    first = text.strip().splitlines()[0][:300] if text.strip() else "no reason given"
    if "Extra files" in text or "Missing files" in text or "Hash mismatch" in text:
        return f"the files are not those that were signed ({first})"
    return f"the signature is not one of the key {publisher.key} ({first})"


def _hashing(folder: Path) -> Any:
    config = _library().hashing.Config()
    config.set_ignored_paths(paths=[folder / SIGNATURE, folder / FOLDER_LOCK], ignore_git_paths=False)
    return config


def _public_key(private_key: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - comes with model-signing

    try:
        key = serialization.load_pem_private_key(private_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as e:
        raise SignatureError(f"{private_key} is not a private key without a password: {e}") from e
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def _library() -> Any:
    try:
        import model_signing  # noqa: PLC0415 - an extra
    except ImportError as e:
        raise SignatureError(f"signatures need the package model-signing ({e}): pip install 'iabn-hub[sign]'") from e
    return model_signing


# ---- publishers that are trusted -------------------------------------------------------------------------------------


def publishers_file() -> Path:
    """Where they are listed: `IABN_HUB_PUBLISHERS`, or iabn_hub/publishers.json in the user's configuration folder."""
    named = os.environ.get(VARIABLE)
    root = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return expanded(named or Path(root) / "iabn_hub" / "publishers.json", VARIABLE)


def publishers() -> dict[str, Publisher]:
    """Who may sign what, by name, such as 'ORG/iabn': {"key": FILE, "minimum": N}; a key is relative to the list.

    Raises:
        SignatureError: the list cannot be read.
    """
    path = publishers_file()
    if not path.is_file():
        return {}
    listed = load_json(path, SignatureError)
    try:
        return {
            str(name): Publisher(path.parent / str(entry["key"]), int(entry.get("minimum", 0)))
            for name, entry in listed.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SignatureError(f'{path} should be {{"ORG/NAME": {{"key": "FILE"}}}} ({e!r})') from e
