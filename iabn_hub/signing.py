"""Signatures of folders: who published them, and that no file was changed, added or left out.

They are those of OpenSSF's model-signing (a sigstore bundle in model.sig, with the SHA-256 of every file), made with an
ECDSA key. What is signed includes release.json, the name and number of the release, so that neither another publisher's
folder nor an older one of the same publisher can take its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import NoHomeError, UntrustedError, expanded, require_trusted, write_atomically
from .schema import LARGEST_FILE, load_json

SIGNATURE, RELEASE = "model.sig", "release.json"
IGNORED = (SIGNATURE, ".gitattributes", ".cache")  # the last two are added by the Hub and by its client
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


def sign(folder: Path, files: Iterable[str], name: str, release: int, private_key: Path) -> None:
    """Write release.json and model.sig, over these files and release.json, into a folder.

    A signature that is right already stays as it is.

    Raises:
        SignatureError: the key cannot be used, or model-signing is not installed; nothing was written.
    """
    signing, public_key = _library(), public_key_of(private_key)
    with tempfile.TemporaryDirectory(prefix="iabn_hub-sign-") as place:
        stage = Path(place) / "folder"
        stage.mkdir()
        for file in set(files) - {SIGNATURE, RELEASE}:
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            _link(folder / file, stage / file)
        (stage / RELEASE).write_text(json.dumps({"name": name, "release": release}, indent=1) + "\n")
        public = Path(place) / "key.pub"
        public.write_bytes(public_key)
        if (folder / SIGNATURE).is_file():
            shutil.copy(folder / SIGNATURE, stage / SIGNATURE)
        try:
            verify(stage, name, Publisher(public, release))
        except SignatureError:
            config = signing.signing.Config().use_elliptic_key_signer(private_key=private_key)
            try:
                config.set_hashing_config(_hashing()).sign(stage, stage / SIGNATURE)
            except Exception as e:  # as many kinds as there are ways to fail
                raise SignatureError(f"{folder} cannot be signed: {str(e).strip() or type(e).__name__}") from e
        for file in (RELEASE, SIGNATURE):
            write_atomically(folder / file, (stage / file).read_bytes())


def verify(folder: Path, name: str, publisher: Publisher) -> int:
    """The number of the release in a folder, if it is complete, unchanged, and signed by that publisher.

    Args:
        name: of what was asked for: ORG/NAME, or NAME alone for that of any ORG.

    Raises:
        SignatureError: it is not; says what is wrong.
    """
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise SignatureError(f"{folder} is not signed: there is no {SIGNATURE} in it")
    if not publisher.key.is_file():
        raise SignatureError(f"the public key {publisher.key} is missing")
    library = _library()
    try:
        # It prints warnings, which must not be among what a script reads.
        with contextlib.redirect_stdout(sys.stderr):
            config = library.verifying.Config().use_elliptic_key_verifier(public_key=publisher.key)
            config.set_hashing_config(_hashing()).verify(folder, signature)
    except Exception as e:  # as many kinds as there are ways to be wrong
        raise SignatureError(f"{folder}: {_reason(e, publisher)}") from e
    signed = load_json(folder / RELEASE, SignatureError)
    found, release = (signed.get("name"), signed.get("release")) if isinstance(signed, dict) else (None, None)
    if found != name and not ("/" not in name and str(found).endswith(f"/{name}")):
        raise SignatureError(f"{folder} is signed as {found!r}, not as {name!r}")
    if type(release) is not int or release < publisher.minimum:
        raise SignatureError(
            f"{folder} is release {release} of {found}; the oldest that is taken is {publisher.minimum}"
        )
    return release


def signed_json(folder: Path, file: str) -> Any:
    """The JSON file of a folder that a listed publisher has signed alone; see `publishers`.

    A private copy is verified and read. Other files in the folder do not matter.

    Raises:
        SignatureError: no listed publisher has signed it, or it is not JSON; says what is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="iabn_hub-signed-") as place:
        copy = Path(place) / "folder"

        def error(text: object) -> SignatureError:
            return SignatureError(str(text).replace(str(copy), str(folder)))

        copy.mkdir()
        for name in (file, RELEASE, SIGNATURE):
            if not (folder / name).is_file():
                raise SignatureError(f"{folder} is not signed: there is no file {name} in it")
            try:
                with (folder / name).open("rb") as source:
                    (copy / name).write_bytes(source.read(LARGEST_FILE + 1))
            except OSError as e:
                raise SignatureError(f"{folder / name}: cannot be read ({e.strerror})") from e
        signed = load_json(copy / RELEASE, error)
        name = str(signed.get("name")) if isinstance(signed, dict) else ""
        publisher = publishers().get(name)
        if publisher is None:
            listed = publishers_file()
            raise SignatureError(f"{folder} is signed as {name!r}, which is not among the publishers of {listed}")
        try:
            verify(copy, name, publisher)
        except SignatureError as e:
            raise error(e) from e
        return load_json(copy / file, error)


def public_key_of(private_key: Path) -> bytes:
    """PEM, of a private key on a curve that model-signing knows.

    Raises:
        SignatureError: the file holds no such key.
    """
    _library()
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - comes with model-signing
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    try:
        key = serialization.load_pem_private_key(private_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as e:
        raise SignatureError(f"{private_key} is not a private key without a password: {e}") from e
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SignatureError(
            f"{private_key} is not a key of ECDSA, such as of openssl ecparam -name prime256v1 -genkey"
        )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def _reason(error: Exception, publisher: Publisher) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if any(words in text for words in ("Extra files", "Missing files", "Hash mismatch")):
        return f"the files are not those that were signed ({text})"
    if "InvalidSignature" in type(error).__name__ or "signature" in text.lower():
        return f"the signature is not one of the key {publisher.key} ({text})"
    return f"the signature cannot be checked with the key {publisher.key} ({text})"


def _hashing() -> Any:
    config = _library().hashing.Config()
    config.set_ignored_paths(paths=[Path(name) for name in IGNORED], ignore_git_paths=False)
    return config.set_allow_symlinks(True)  # the Hub's cache consists of links; what they lead to is hashed


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file.resolve(), to)
    except OSError:  # another file system
        shutil.copy(file, to)


def _library() -> Any:
    try:
        import model_signing  # noqa: PLC0415 - an extra
    except ImportError as e:
        raise SignatureError(f"signatures need the package model-signing ({e}): pip install 'iabn-hub[sign]'") from e
    return model_signing


# ---- publishers that are trusted -------------------------------------------------------------------------------------


def publishers_file() -> Path:
    """Where they are listed: `IABN_HUB_PUBLISHERS`, or iabn_hub/publishers.json in the user's configuration folder.

    Raises:
        SignatureError: there is no such place.
    """
    named = os.environ.get(VARIABLE)
    root = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    try:
        path = expanded(named or Path(root) / "iabn_hub" / "publishers.json", VARIABLE)
    except NoHomeError as e:
        raise SignatureError(
            f"the home folder of this user is not known: set {VARIABLE} to the list of publishers"
        ) from e
    if not path.is_absolute():
        raise SignatureError(f"{VARIABLE} is {named!r}: name the list by its absolute path")
    return path


def publishers() -> dict[str, Publisher]:
    """Who may sign what, by name, such as 'ORG/iabn': {"key": FILE, "minimum": N}; a key is relative to the list.

    Raises:
        SignatureError: the list cannot be read, or other users can change it or a key.
    """
    path = publishers_file()
    if not path.is_file():
        return {}
    found: dict[str, Publisher] = {}
    try:
        require_trusted(path)
        listed = load_json(path, SignatureError)
        for name, entry in (listed if isinstance(listed, dict) else {"": None}).items():
            found[name] = _publisher(path, name, entry)
            require_trusted(found[name].key)
    except UntrustedError as e:
        raise SignatureError(f"whoever can change the list of publishers can run code, and {e}") from e
    return found


def _publisher(path: Path, name: str, entry: Any) -> Publisher:
    right = isinstance(entry, dict) and entry.keys() <= {"key", "minimum"} and isinstance(entry.get("key"), str)
    if not right or type(entry.get("minimum", 0)) is not int or entry.get("minimum", 0) < 0:
        raise SignatureError(
            f'{path}: {name!r} should be {{"key": FILE, "minimum": RELEASE}}, with the file of a public key and the '
            "number of the oldest release that is taken"
        )
    return Publisher(path.parent / entry["key"], entry.get("minimum", 0))
