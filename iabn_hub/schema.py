"""Records read from JSON that others wrote: valid and frozen, or one sentence that names the field and its value."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import stat
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

T = TypeVar("T")
LONGEST_VALUE = 80  # characters of a value that a message shows
DEEPEST = 32  # levels of lists and objects
LONGEST_INTEGER = 18  # digits and sign: what fits 64 bits
LARGEST_FILE = 16 << 20  # bytes
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def record_class(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that checks the types of its fields.

    Strict: 1 is not true, "10" is not 10. Only 90.0 is 90, as other programs write it.
    """
    return dataclass(frozen=True, config=_CONFIG)(cls)  # type: ignore[return-value]


def replaced(value: T, **changes: Any) -> T:
    """A copy of a record with other values of some fields."""
    copy: T = dataclasses.replace(typing.cast(Any, value), **changes)
    return copy


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]


def require(condition: bool, message: str) -> None:
    """Refuse a record from within its `__post_init__`."""
    if not condition:
        raise ValueError(message)


def read_json(text: str) -> Any:
    """Parsed JSON whose values every program can hold: finite numbers, integers of 64 bits, printable texts, and
    lists and objects up to `DEEPEST` levels deep.

    Raises:
        ValueError: not such JSON.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{shortened(name)} is not a number")

    def real(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    def integer(digits: str) -> int:
        if len(digits) > LONGEST_INTEGER:
            raise ValueError(f"{shortened(digits)} is too large a number")
        return int(digits)

    try:
        content = json.loads(text, parse_constant=refuse, parse_float=real, parse_int=integer)
    except RecursionError as e:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from e
    _check_json(content, 0)
    return content


def _check_json(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if isinstance(value, str) and _UNUSABLE.search(value):
        raise ValueError(f"the text {shortened(ascii(value))} has a NUL character or half of a surrogate pair")
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    for each in inner:
        _check_json(each, depth + 1)


def shortened(text: str, longest: int = LONGEST_VALUE) -> str:
    """The text, or its first `longest` characters and '…'."""
    return text if len(text) <= longest else text[:longest] + "…"


def load_json(path: Path, error: Callable[[str], Exception]) -> Any:
    """`read_json` of a file in UTF-8.

    Args:
        error: makes the exception of a sentence that names the file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path}: is not a file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror})") from e
    if len(content) > LARGEST_FILE:
        raise error(f"{path}: has more than {LARGEST_FILE:,} bytes")
    try:
        return read_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise error(f"{path}: is not text in UTF-8 ({e.reason} at byte {e.start})") from e
    except ValueError as e:
        raise error(f"{path}: is not JSON: {e}") from e


def parse(cls: type[T], content: Any, error: Callable[[str], Exception]) -> T:
    """An instance of a record class from parsed JSON.

    Args:
        error: makes the exception of a sentence such as "optimizer.batch_size is 'many': must be a valid integer".
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(content))
    except ValidationError as e:
        raise error(_sentence(cls, e)) from e


def _sentence(cls: Any, error: ValidationError) -> str:
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    # A misspelt key explains why another one is missing.
    first = next((e for e in error.errors() if e["type"] in unknown), error.errors()[0])
    path = [step for step in first["loc"] if not (isinstance(step, str) and "[" in step)]  # a validator's own name
    name = ".".join(map(str, path))
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind in unknown:
        inside = ".".join(map(str, path[:-1]))
        known = _fields_at(cls, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return f"unknown key {path[-1]!r}" + (f" in {inside}" if inside else "") + f"; {hint}"
    if kind in ("missing", "missing_argument"):
        missing = [".".join(map(str, e["loc"])) for e in error.errors() if e["type"] == kind]
        return f"missing field {', '.join(missing)}"
    if kind == "value_error":  # of a `require`, which names the field itself
        inside = f"{name}." if name else ""
        return inside + message
    value = shortened(repr(first["input"]))
    return f"{name or 'the content'} is {value}: {message.replace('Input should be', 'must be')}"


def _fields_at(cls: Any, path: list[Any]) -> list[str]:
    """The field names of the record class that stands at a path below `cls`."""
    for step in path:
        if isinstance(step, int):
            continue
        hint = typing.get_type_hints(cls)[step]
        inner = [each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)]
        if not inner:
            return []
        cls = inner[0]
    return [field.name for field in dataclasses.fields(cls) if field.init]


def to_dict(value: Any) -> dict[str, Any]:
    """The record as plain values, ready for JSON."""
    plain: dict[str, Any] = dataclasses.asdict(value)
    return plain


def changed_fields(now: Mapping[str, Any], before: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs between two records as dictionaries: the dotted name, the value before and the value now."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in now.items():
        name, earlier = f"{prefix}{key}", before.get(key)
        if isinstance(value, Mapping) and isinstance(earlier, Mapping):
            found |= changed_fields(value, earlier, f"{name}.")
        elif value != earlier:
            found[name] = (earlier, value)
    return found
