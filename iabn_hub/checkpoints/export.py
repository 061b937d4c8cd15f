"""Weights to safetensors: the same weights give the same bytes, and a file is whole or not there."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader never sees a part of it, and a failure leaves the old file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
