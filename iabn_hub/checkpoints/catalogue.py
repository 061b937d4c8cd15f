"""The catalogue: which checkpoints exist, what they scored, under which licence, and where their bytes are.

`catalogue.json` beside this file lists the published ones. `IABN_HUB_CATALOGUE` names further files of the same
schema, separated as in PATH; their records come after ours. The README documents the schema.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CatalogueError, UnknownNameError

_logger = logging.getLogger(__name__)
ENVIRONMENT = "IABN_HUB_CATALOGUE"
TASKS = ("classification", "segmentation")
LAYOUTS = ("legacy", "iabn_hub")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest", "box", "hamming")
# What the caller decides, or the record says elsewhere.
NOT_OPTIONS = {"num_classes", "in_chans", "features_only", "device", "dtype"}
SUFFIXES = {"legacy": ".pth.tar", "iabn_hub": ".safetensors"}


@dataclass(frozen=True)
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
    resize: int | None = None
    crop: int | None = None
    ten_crop: bool = False
    images: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        _check_types(self)
        figures = [f for f in (self.top1, self.top5, self.miou) if f is not None]
        _require(bool(figures), "a result needs top1, top5 or miou")
        _require(all(0 <= f <= 100 for f in figures), f"figures are percentages, got {figures}")


@dataclass(frozen=True)
class Preprocessing:
    """How images become the network's input; sizes in pixels, mean and std for RGB values in 0..1."""

    size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.size[0] > 0, f"size must have channels, got {self.size}")
        _require(all(32 <= side <= 4096 for side in self.size[1:]), f"sides must be 32 to 4096 pixels, got {self.size}")
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _require(min(self.std) > 0, f"std must be positive, got {self.std}")
        _require(0 < self.crop_pct <= 1, f"crop_pct must be in (0, 1], got {self.crop_pct}")


@dataclass(frozen=True)
class HubFile:
    """A file in a Hugging Face Hub repository; the digest is its own."""

    repo: str
    md5: str
    revision: str = "main"
    filename: str = "model.safetensors"

    def __post_init__(self) -> None:
        _check_types(self)
        _require(bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo)), f"hub.repo is {self.repo!r}, not ORG/NAME")
        _check_md5(self.md5)


@dataclass(frozen=True)
class Checkpoint:
    """One published file of weights.

    `file` is a path relative to the catalogue that lists it, for weights that are already on this machine.
    `options` are arguments for the model that the weights need.
    """

    model: str
    tag: str
    md5: str
    task: str = "classification"
    layout: str = "legacy"
    file: str | None = None
    google_drive_id: str | None = None
    hub: HubFile | None = None
    dataset: str = "imagenet-1k"
    num_classes: int = 1000
    classes: tuple[str, ...] | None = None
    parameters: int | None = None
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
        _check_types(self)
        _require(bool(re.fullmatch(r"[a-z][a-z0-9_]*", self.model)), f"model is {self.model!r}, not an identifier")
        _require(bool(re.fullmatch(r"[A-Za-z0-9][\w-]*", self.tag)), f"tag is {self.tag!r}, not a word")
        _check_md5(self.md5)
        _one_of("task", self.task, TASKS)
        _one_of("layout", self.layout, LAYOUTS)
        misplaced = NOT_OPTIONS & set(self.options)
        _require(not misplaced, f"options must not hold {', '.join(sorted(misplaced))}")
        _require(self.num_classes > 0, f"num_classes must be positive, got {self.num_classes}")
        _require(
            self.classes is None or len(self.classes) == self.num_classes,
            f"{len(self.classes or ())} classes are named, but num_classes is {self.num_classes}",
        )

    @property
    def name(self) -> str:
        """`model.tag`, as timm writes it."""
        return f"{self.model}.{self.tag}"

    @property
    def filename(self) -> str:
        """The name of the file in a cache or a mirror."""
        return self.name + SUFFIXES[self.layout]

    def result(self, protocol: str) -> Result | None:
        return next((r for r in self.results if r.protocol == protocol), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(what: str, value: str, choices: Iterable[str]) -> None:
    _require(value in choices, f"{what} is {value!r}: choose one of {', '.join(choices)}")


def _check_md5(md5: str) -> None:
    _require(bool(re.fullmatch(r"[0-9a-f]{32}", md5)), f"md5 is {md5!r}, not 32 lowercase hexadecimal digits")


def _check_types(record: Any) -> None:
    for name, wanted in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _is_a(value, wanted):
            raise ValueError(f"{name} is {value!r}, expected {_spell(wanted)}")


def _is_a(value: Any, wanted: Any) -> bool:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        return any(_is_a(value, each) for each in arguments)
    if origin is tuple:
        fits = isinstance(value, tuple) and (arguments[-1] is Ellipsis or len(value) == len(arguments))
        return fits and all(_is_a(v, arguments[0]) for v in value)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or wanted)


def _spell(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)


def _build(cls: Any, values: Any) -> Any:
    """A record from parsed JSON; ValueError says what is wrong, with the nearest name for a misspelt field."""
    _require(isinstance(values, dict), f"{cls.__name__} must be an object, got {values!r}")
    known = {f.name: f for f in dataclasses.fields(cls) if f.name != "catalogue"}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"unknown field {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    required = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [n for n in required if n not in values]
    _require(not missing, f"missing field {', '.join(missing)}")
    nested = {"input": Preprocessing, "hub": HubFile}
    converted = {}
    for name, value in values.items():
        if name in nested and value is not None:
            value = _build(nested[name], value)
        elif name == "results":
            _require(isinstance(value, list), "results must be a list")
            value = tuple(_build(Result, each) for each in value)
        converted[name] = tuple(value) if isinstance(value, list) else value
    return cls(**converted)


def read_catalogue(path: str | os.PathLike[str]) -> tuple[Checkpoint, ...]:
    """The records of one catalogue file.

    Raises:
        CatalogueError: the file cannot be read or a record is invalid; names file, record and field.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CatalogueError(f"{path}: cannot read this catalogue ({e.strerror}); check {ENVIRONMENT}") from e
    except (ValueError, RecursionError) as e:
        raise CatalogueError(f"{path}: not a JSON file ({e})") from e
    if not isinstance(content, dict) or not isinstance(content.get("checkpoints"), list):
        raise CatalogueError(f"{path}: expected an object with a list 'checkpoints'")
    citations = content.get("citations", {})
    if not isinstance(citations, dict) or not all(isinstance(text, str) for text in citations.values()):
        raise CatalogueError(f"{path}: 'citations' must be an object of texts")
    records = []
    for index, values in enumerate(content["checkpoints"]):
        label = f"checkpoints[{index}]"
        if isinstance(values, dict) and values.get("model"):
            label += f" ({values['model']}.{values.get('tag')})"
        try:
            record = _build(Checkpoint, values)
            records.append(
                dataclasses.replace(
                    record, catalogue=str(path), citation=citations.get(record.citation, record.citation)
                )
            )
        except (ValueError, TypeError) as e:
            raise CatalogueError(f"{path}: {label}: {e}") from e
    return tuple(records)


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
    except CatalogueError as e:
        _logger.warning("%s. Added catalogues are left out.", e)
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
