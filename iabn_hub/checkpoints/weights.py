"""Read weights without running code, and write safetensors whose bytes depend on the weights alone."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..files import write_atomically
from .errors import CheckpointError
from .legacy import flat, to_current

BEST = "best.pt"  # the snapshot of the best epoch of a run
WEIGHTS, BEST_WEIGHTS = "model.safetensors", "best.safetensors"  # of a run: its last epoch, and its best
SNAPSHOT_KEYS = {"model", "ema", "optimizer", "position", "recipe", "classes"}
SNAPSHOT_TYPES: dict[str, Any] = {
    "model": dict, "optimizer": dict, "position": dict, "sums": dict, "rows": list, "recipe": dict,
}  # fmt: skip
# What training scripts store beside weights and what holds no code: options, and numbers of numpy.
_NUMBERS = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
_SCALAR: Any = np.float64(0).__reduce__()[0]
PLAIN_VALUES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # written by numpy 1
    *_NUMBERS,
]
CONTAINERS = ("state_dict", "model")  # where training snapshots keep their weights


def read_weights(path: Path) -> dict[str, Any]:
    """The state dict in a `.safetensors` file, or in any file that torch.save wrote, on the CPU.

    A snapshot may hold other things beside it (optimizer, numbers, an argparse.Namespace). Code in a pickle is
    refused, not run.

    Raises:
        CheckpointError: there is no such file, or it holds no state dict; names the file.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file")
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_archive(path)
        with torch.serialization.safe_globals(PLAIN_VALUES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e})") from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path}: is not a file of weights, or holds code, which is never run") from e
    except Exception as e:  # a damaged file fails in as many ways as it has bytes
        raise CheckpointError(f"{path}: is not a file of weights, or is damaged ({type(e).__name__})") from e
    if isinstance(content, dict) and content.keys() >= SNAPSHOT_KEYS:
        content = content["ema"] or content["model"]  # what was validated
    for name in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    for name, value in flat(content).items():
        if isinstance(value, Tensor) and value.is_meta:
            raise CheckpointError(f"{path}: {name} is on the meta device: it has a shape, but no values")
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            needed = value.numel() * value.element_size()
            if needed > value.untyped_storage().nbytes():
                raise CheckpointError(f"{path}: {name} would take {needed:,} bytes, which the file does not hold")
    return content


def _check_archive(path: Path) -> None:
    """Refuse a file of torch.save whose records are compressed, overlap or are damaged; torch looks at none of it.

    A compressed record of a megabyte can unpack to gigabytes.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch's older format, a pickle followed by the bytes of the tensors
            return
    if not _has_one_directory(path):
        raise CheckpointError(f"{path}: is not a file of weights, or is damaged: it is not one zip archive")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for each in records:
            if each.compress_type != zipfile.ZIP_STORED or each.file_size != each.compress_size:
                raise CheckpointError(
                    f"{path}: the record {each.filename!r} is compressed, which torch.save never does: it was not read"
                )
        if sum(each.file_size for each in records) > path.stat().st_size:
            raise CheckpointError(f"{path}: its records are larger than the file: it was not read")
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"{path}: is damaged: the record {damaged!r} does not have its CRC-32 (a file "
                "saved with torch.serialization.set_crc32_options(False) has none: save it anew)"
            )


def _has_one_directory(path: Path) -> bool:
    """Whether the directory of a zip file stands right before its end, so that Python and torch read the same one."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - _END.size
        file.seek(max(end, 0))
        *_, size, offset, comment = _END.unpack(file.read(_END.size).ljust(_END.size))
        place, found = end, [(size, offset)]
        file.seek(max(end - _LOCATOR.size, 0))
        sign, _, at, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if sign == b"PK\x06\x07":  # the end of a zip64 file stands before this
            place = end - _LOCATOR.size - _END64.size
            if at != place:
                return False
            file.seek(place)
            *_, size64, offset64 = _END64.unpack(file.read(_END64.size).ljust(_END64.size))
            found = [(size64, offset64), (size64 if size == _SEE64 else size, offset64 if offset == _SEE64 else offset)]
    return comment == 0 and all(size + offset == place for size, offset in found)


_END, _LOCATOR, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
_SEE64 = 0xFFFFFFFF  # the number stands in the zip64 record


def user_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user named, whose ~ is a home folder.

    Raises:
        CheckpointError: that folder is not known.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as e:
        raise CheckpointError(f"{name}: this home folder is not known") from e


def read_snapshot(path: Path) -> dict[str, Any]:
    """A snapshot of a training run: tensors and plain values, on the CPU.

    Raises:
        CheckpointError: not there, damaged, or not a snapshot.
    """
    try:
        _check_archive(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: there is no such file") from e
    except Exception as e:  # a damaged file fails in as many ways as it has bytes
        raise CheckpointError(f"{path}: is not a snapshot, or is damaged ({type(e).__name__})") from e
    if not isinstance(state, dict) or not state.keys() >= SNAPSHOT_KEYS:
        raise CheckpointError(f"{path}: is not a snapshot of a training run; for a file of weights pass --arch")
    wrong = [name for name, kind in SNAPSHOT_TYPES.items() if not isinstance(state.get(name, kind()), kind)]
    whole = [state["position"].get(name) for name in ("epoch", "step", "steps_per_epoch")] if not wrong else []
    if wrong or not all(isinstance(number, int) for number in whole):
        raise CheckpointError(f"{path}: is not a snapshot: {', '.join(wrong) or 'position'} is not what it must be")
    if not all(isinstance(row, dict) for row in state.get("rows", [])):
        raise CheckpointError(f"{path}: is not a snapshot: rows is not what it must be")
    return _with_new_names(state)


# Names that the first version wrote.
_SUMS = {"right": "correct", "right_of_five": "correct_top5"}
_COLUMNS = {"accuracy": "pixel_accuracy", "val_accuracy": "val_pixel_accuracy"}


def _with_new_names(state: dict[str, Any]) -> dict[str, Any]:
    for part in ("model", "ema"):
        if state[part]:
            state[part] = to_current(state[part])
    state["sums"] = {_SUMS.get(name, name): value for name, value in state.get("sums", {}).items()}
    state["rows"] = [{_COLUMNS.get(name, name): v for name, v in row.items()} for row in state.get("rows", [])]
    return state


WEIGHT_FILES = (WEIGHTS, "*.safetensors", "*.pth.tar", "*.pth", "*.pt", "*.bin")


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder as timm or `tools/train.py` writes it.

    Raises:
        CheckpointError: there is none, or several and none of them is `model.safetensors`.
    """
    for pattern in WEIGHT_FILES:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(f"{folder}: has {len(found)} files {pattern}; name the one to load")
        if found:
            return found[0]
    raise CheckpointError(f"{folder}: holds no weights (looked for {', '.join(WEIGHT_FILES)})")


def save_safetensors(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write weights and metadata to `path`, overwriting it.

    Args:
        state_dict: dense tensors that share no memory.
        metadata: string to string; written sorted by key, where the library itself writes them in random order.

    Raises:
        OSError: `path` cannot be written; nothing is left behind.
    """
    content = safetensors.torch.save(dict(state_dict), {"format": "pt", **metadata})
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    # Spaces behind the header are part of the format; they keep the tensors where they were.
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    write_atomically(path, content[:8] + text + content[8 + length :])
