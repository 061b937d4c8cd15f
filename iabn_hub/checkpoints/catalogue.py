"""The catalogue: which checkpoints exist, what they scored, under which licence, and where their bytes are.

`catalogue.json` beside this file lists the published ones. `IABN_HUB_CATALOGUE` names further files of the same
schema, separated as in PATH; their records come after ours. The README documents the schema.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..files import Digests
from ..schema import Integer, load_json, parse, record_class, replaced, require, to_dict
from ..signing import SignatureError, signed_json
from ..terminal import printable
from .errors import CatalogueError, UnknownNameError

_logger = logging.getLogger(__name__)
ENVIRONMENT = "IABN_HUB_CATALOGUE"
SIGNED = "catalogue.json"  # of a signed folder
# What the caller decides, or the record says elsewhere.
NOT_OPTIONS = {"num_classes", "in_chans", "features_only", "device", "dtype"}
TAG = re.compile(r"[A-Za-z0-9][\w-]*", re.ASCII)  # it becomes part of file names
SUFFIXES = {"legacy": ".pth.tar", "iabn_hub": ".safetensors", "efficientnet_pytorch": ".pth"}


Size = Annotated[Integer, Field(gt=0)]


@record_class
class Result:
    """One measured figure and how it was measured.

    `resize` is the length of the shorter side before cropping, `crop` the side of the square crop, in pixels;
    None where the source does not state it. `top1`, `top5` and `miou` are percentages.
    """

    protocol: str
    dataset: str
    top1: float | None = None
    top5: float | None = None
    miou: float | None = None
    resize: Integer | None = None
    crop: Integer | None = None
    ten_crop: bool = False
    images: Integer | None = None
    note: str = ""

    def __post_init__(self) -> None:
        figures = [f for f in (self.top1, self.top5, self.miou) if f is not None]
        require(bool(figures), "a result needs top1, top5 or miou")
        require(all(0 <= f <= 100 for f in figures), f"figures are percentages, got {figures}")


@record_class
class Preprocessing:
    """How images become the network's input; sizes in pixels, mean and std for RGB values in 0..1."""

    size: tuple[Integer, Integer, Integer] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        require(self.size[0] > 0, f"size must have channels, got {self.size}")
        require(all(32 <= side <= 4096 for side in self.size[1:]), f"sides must be 32 to 4096 pixels, got {self.size}")
        require(min(self.std) > 0, f"std must be positive, got {self.std}")
        require(0 < self.crop_pct <= 1, f"crop_pct must be in (0, 1], got {self.crop_pct}")


@record_class
class HubFile:
    """A file in a Hugging Face Hub repository; the digest is its own."""

    repo: str
    md5: str
    revision: str = "main"
    filename: str = "model.safetensors"
    bytes: Size | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo)), f"repo is {self.repo!r}, not ORG/NAME")
        _check_digests(self.md5, self.sha256)

    @property
    def digests(self) -> Digests:
        return Digests(self.md5, self.sha256)


@record_class
class PackageFile:
    """A file in a package of pip's; the digest is that of the record.

    `path` is relative to the folder into which packages are installed.
    """

    name: str
    path: str

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name, re.ASCII)), f"name is {self.name!r}, not a package")
        parts = self.path.split("/")
        require("" not in parts and ".." not in parts, f"path is {self.path!r}, not a relative path")


@record_class
class Checkpoint:
    """One published file of weights.

    `bytes` is the size of the file; `sha256` is verified beside `md5` where it is stated. `file` is a path relative to
    the catalogue that lists it, for weights that are already on this machine. `options` are arguments for the model
    that the weights need.
    """

    model: str
    tag: str
    md5: str
    task: Literal["classification", "segmentation"] = "classification"
    layout: Literal["legacy", "iabn_hub", "efficientnet_pytorch"] = "legacy"
    file: str | None = None
    bytes: Size | None = None
    sha256: str = ""
    google_drive_id: str | None = None
    hub: HubFile | None = None
    package: PackageFile | None = None
    dataset: str = "imagenet-1k"
    num_classes: Integer = 1000
    classes: tuple[str, ...] | None = None
    parameters: Size | None = None
    input: Preprocessing = field(default_factory=Preprocessing)
    options: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[Result, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    license: str = ""
    license_link: str = ""
    citation: str = ""
    description: str = ""
    catalogue: str = ""

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[a-z][a-z0-9_]*", self.model)), f"model is {self.model!r}, not an identifier")
        require(bool(TAG.fullmatch(self.tag)), f"tag is {self.tag!r}, not a word")
        _check_digests(self.md5, self.sha256)
        misplaced = NOT_OPTIONS & set(self.options)
        require(not misplaced, f"options must not hold {', '.join(sorted(misplaced))}")
        require(self.num_classes > 0, f"num_classes must be positive, got {self.num_classes}")
        require(
            self.classes is None or len(self.classes) == self.num_classes,
            f"{len(self.classes or ())} classes are named, but num_classes is {self.num_classes}",
        )

    @property
    def name(self) -> str:
        """`model.tag`, as timm writes it."""
        return f"{self.model}.{self.tag}"

    @property
    def digests(self) -> Digests:
        """What the file is verified by."""
        return Digests(self.md5, self.sha256)

    @property
    def filename(self) -> str:
        """The name of the file in a cache or a mirror."""
        return self.name + SUFFIXES[self.layout]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return to_dict(self)

    @property
    def source_url(self) -> str:
        """The page of the file's publisher, where one is known."""
        if self.google_drive_id:
            return f"https://drive.google.com/file/d/{self.google_drive_id}"
        return f"https://pypi.org/project/{self.package.name}/" if self.package else ""

    def result(self, protocol: str) -> Result | None:
        """The figures of a protocol, or None."""
        return next((r for r in self.results if r.protocol == protocol), None)


def _check_digests(md5: str, sha256: str) -> None:
    require(bool(re.fullmatch(r"[0-9a-f]{32}", md5)), f"md5 is {md5!r}, not 32 lowercase hexadecimal digits")
    right = sha256 == "" or re.fullmatch(r"[0-9a-f]{64}", sha256)
    require(bool(right), f"sha256 is {sha256!r}, not 64 lowercase hexadecimal digits")


def read_catalogue(path: str | os.PathLike[str]) -> tuple[Checkpoint, ...]:
    """The records of one catalogue: a file NAME.json, or a folder with a catalogue.json that a listed publisher signed.

    Raises:
        CatalogueError: it cannot be read, its signature is not right, or a record is invalid; names file, record and
            field.
    """
    path = Path(path)
    if path.suffix != ".json":  # not what is there decides, or a file could take the place of a signed folder
        return _read_signed(path)
    return _records_of(path, load_json(path, lambda text: CatalogueError(f"{text}; check {ENVIRONMENT}")))


def _read_signed(folder: Path) -> tuple[Checkpoint, ...]:
    if not folder.is_dir():
        raise CatalogueError(f"{folder}: is neither a file NAME.json nor a signed folder; check {ENVIRONMENT}")
    try:
        content = signed_json(folder, SIGNED)
    except SignatureError as e:
        raise CatalogueError(f"{e}; check {ENVIRONMENT}") from e
    path = folder / SIGNED
    found = _records_of(path, content)
    require_sha256(found)
    return found


def require_sha256(found: Iterable[Checkpoint]) -> None:
    """What is asked of a signed catalogue.

    Raises:
        CatalogueError: a record does not state the SHA-256 of its file.
    """
    for record in found:
        if not record.sha256 or (record.hub and not record.hub.sha256):
            raise CatalogueError(
                f"{record.catalogue}: {record.name}: a signed catalogue states the sha256 of each file: without it, "
                "the signature does not hold for the weights"
            )


def _records_of(path: Path, content: Any) -> tuple[Checkpoint, ...]:
    if not isinstance(content, dict) or not isinstance(content.get("checkpoints"), list):
        raise CatalogueError(f"{path}: expected an object with a list 'checkpoints'")
    citations = content.get("citations", {})
    if not isinstance(citations, dict) or not all(isinstance(text, str) for text in citations.values()):
        raise CatalogueError(f"{path}: 'citations' must be an object of texts")
    return tuple(_read_record(path, index, values, citations) for index, values in enumerate(content["checkpoints"]))


def _read_record(path: Path, index: int, values: Any, citations: dict[str, str]) -> Checkpoint:
    label = f"checkpoints[{index}]"
    if isinstance(values, dict) and values.get("model"):
        label += f" ({values['model']}.{values.get('tag')})"
    if isinstance(values, dict) and "catalogue" in values:
        raise CatalogueError(f"{path}: {label}: unknown key 'catalogue'")
    found = parse(Checkpoint, values, lambda text: CatalogueError(f"{path}: {label}: {text}"))
    return replaced(found, catalogue=str(path), citation=citations.get(found.citation, found.citation))


BUILT_IN = Path(__file__).with_name("catalogue.json")


@functools.lru_cache(maxsize=1)
def _read_all(paths: tuple[str, ...]) -> dict[str, Checkpoint]:
    found: dict[str, Checkpoint] = {}
    for path in paths:
        for record in read_catalogue(path):
            if record.name in found:
                raise CatalogueError(
                    f"{path}: {record.name} is already listed in {found[record.name].catalogue}; use another tag"
                )
            found[record.name] = record
    return found


def records() -> dict[str, Checkpoint]:
    """All records by name: ours first, then those of the files in IABN_HUB_CATALOGUE.

    Raises:
        CatalogueError: one of those files is not a catalogue, or repeats a name.
    """
    added = [p for p in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if p]
    return dict(_read_all((str(BUILT_IN), *added)))


@functools.cache
def records_at_import() -> dict[str, Checkpoint]:
    """`records`, or ours alone if an added file is bad: a typing mistake there must not break `import iabn_hub`.

    It is logged here, and raised by whatever asks for a checkpoint later.
    """
    try:
        return records()
    except Exception as e:  # whatever an added file may bring about
        _logger.warning("%s. Added catalogues are left out.", printable(e))
        return {record.name: record for record in read_catalogue(BUILT_IN)}


def checkpoints_of(model: str) -> list[Checkpoint]:
    """The records of one architecture; the first is its default."""
    return [record for record in records().values() if record.model == model]


def find(name: str) -> Checkpoint:
    """The record called `model.tag`, or the default record of `model`.

    Raises:
        UnknownNameError: no such record; the message lists near names.
    """
    known = records()
    if name in known:
        return known[name]
    of_model = checkpoints_of(name)
    if of_model:
        return of_model[0]
    tags = [r.name for r in checkpoints_of(name.partition(".")[0])]
    models = [r.model for r in known.values()]
    raise UnknownNameError(
        f"no checkpoint is called {name!r}" + suggest(name, tags or [*known, *dict.fromkeys(models)])
    )


def suggest(name: str, choices: Iterable[str]) -> str:
    """'; did you mean …?' with the nearest of `choices`, and where to see them all."""
    near = difflib.get_close_matches(name, list(choices), 3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return hint + " 'iabn-hub list' shows all names"
