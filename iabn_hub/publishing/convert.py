"""Convert files of weights between our layout and the legacy layout of mapillary/inplace_abn."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..checkpoints.legacy import flat, is_legacy, to_current, to_legacy
from ..checkpoints.weights import read_weights, save_safetensors
from ..files import md5_of, write_atomically
from ..models import create_model
from ..models.pretrained import load_pretrained
from ..models.state_dict import count_classes, fit
from .export import CONVERTER

# The layout that a suffix stands for.
LAYOUTS = {".safetensors": "iabn_hub", ".tar": "legacy", ".pth": "legacy", ".pt": "legacy"}


def convert(given: Path, out: Path, arch: str | None = None, norm_layer: str | None = None) -> dict[str, Any]:
    """Write the weights of `given` to `out` in the layout of its suffix; returns what changed.

    Args:
        arch: a name of `MODELS` that the weights must fit.
        norm_layer: 'abn' writes the scales |w| + eps of in-place layers as weights of a standard BatchNorm.

    Raises:
        CheckpointError: they cannot be read, or are not those of a network of ours.
        OSError: `out` cannot be written; what was there stays.
    """
    everything = flat(read_weights(given))
    tensors = {name: value for name, value in everything.items() if isinstance(value, Tensor)}
    dropped = [name for name in everything if name not in tensors]
    current = to_current(tensors)
    if arch is not None:
        count = count_classes(current)
        classes: dict[str, Any] = {} if count is None else {"num_classes": count}
        network = create_model(arch, **classes)
        fit(current, network)
    if norm_layer is not None:
        converted = load_pretrained(str(given), arch).rebuilt(norm_layer=norm_layer).model.state_dict()
        current = {name: converted[name] for name in current}
    layout = LAYOUTS[out.suffix]
    names = dict(zip(current, tensors))
    names = to_legacy(names) if layout == "legacy" else names
    state = dict(zip(names, (current[name].detach().clone().contiguous() for name in current)))
    if layout == "iabn_hub":
        facts = {"arch": arch or "", "source": given.name, "source_md5": md5_of(given), "converter": CONVERTER}
        metadata = {name: value for name, value in (facts | {"iabn_hub": __version__}).items() if value}
        save_safetensors(state, out, metadata)
    else:
        content = io.BytesIO()
        torch.save({"state_dict": _parts(state)}, content)
        write_atomically(out, content.getvalue())
    return {
        "in": str(given),
        "out": str(out),
        "from": "legacy" if is_legacy(tensors) else "iabn_hub",
        "to": layout,
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values() if value.is_floating_point()),
        "renamed": {old: new for new, old in names.items() if old != new},
        "left_out": dropped,
        "bytes": out.stat().st_size,
        "md5": md5_of(out),
    }


def _parts(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a segmentation network, the three state dicts that its scripts load; else one."""
    if not any(name.startswith("body.") for name in state):
        return dict(state)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        part, _, inner = name.partition(".")
        parts.setdefault(part, {})[inner] = value
    return dict(parts)
