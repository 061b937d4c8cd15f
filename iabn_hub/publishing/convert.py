"""The command that converts files of weights between layouts: `tools/convert_checkpoint.py IN OUT`."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..checkpoints.errors import CheckpointError
from ..checkpoints.export import save_safetensors, write_atomically
from ..checkpoints.fit import count_classes, fit
from ..checkpoints.legacy import flat, is_legacy, to_current, to_legacy
from ..checkpoints.verify import md5_of
from ..checkpoints.weights import read_weights
from ..commands import FAILED, INTERRUPTED, OK, complain
from ..models import MODELS, create_model
from .export import CONVERTER

PROGRAM = "convert_checkpoint.py"
DESCRIPTION = """Convert a file of weights from one layout to another, and say what changed.

OUT decides: .safetensors has the names of iabn_hub, .pth, .pth.tar and .pt the legacy names of the package inplace_abn,
written by torch.save with nothing but tensors in it (its scripts read no other format). IN may be any of them, or a
training snapshot; whatever is not a tensor is left out. Code in a pickle is refused, not run."""
EXAMPLES = """examples:
  python tools/convert_checkpoint.py resnext101_ipabn_lr_512.pth.tar model.safetensors --arch resnext101_iabn
  python tools/convert_checkpoint.py model.safetensors for_inplace_abn.pth.tar
"""
# Where files for standard BatchNorm will be a third layout, once `to_batchnorm` converts networks.
LAYOUTS = {".safetensors": "iabn_hub", ".tar": "legacy", ".pth": "legacy", ".pt": "legacy"}
SHOWN = 3


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("given", metavar="IN", type=Path)
    p.add_argument("out", metavar="OUT", type=Path)
    p.add_argument("--arch", choices=MODELS, metavar="NAME", help="check that the weights are this network's, such as "
                   "resnext101_iabn, and note it in the file")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    p.add_argument("--json", action="store_true", help="print JSON for a program instead of text for a person")
    return p


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit code: 0 fine, 1 failed, 2 wrong usage."""
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.out.suffix not in LAYOUTS:
        p.error(f"OUT is {arguments.out}: its suffix must be one of {', '.join(LAYOUTS)}")
    if arguments.out.exists() and not arguments.overwrite:
        p.error(f"{arguments.out} is there already: name another file, or pass --overwrite")
    try:
        report = convert(arguments.given, arguments.out, arguments.arch)
    except (CheckpointError, OSError) as e:
        return complain(PROGRAM, e, FAILED)
    except KeyboardInterrupt:
        return complain(PROGRAM, "interrupted", INTERRUPTED)
    print(json.dumps(report, indent=1) if arguments.json else _text(report))
    return OK


def convert(given: Path, out: Path, arch: str | None = None) -> dict[str, Any]:
    """Write the weights of `given` to `out` in the layout of its suffix; returns what changed.

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


def _text(report: dict[str, Any]) -> str:
    renamed = list(report["renamed"].items())
    lines = [
        f"{report['out']}: {report['from']} to {report['to']}, {report['tensors']:,} tensors, "
        f"{report['bytes']:,} bytes, md5 {report['md5']}",
        f"  {len(renamed):,} renamed" + "".join(f"\n    {old} → {new}" for old, new in renamed[:SHOWN]),
    ]
    lines += ["    …"] if len(renamed) > SHOWN else []
    if report["left_out"]:
        lines.append(f"  left out, not tensors: {', '.join(report['left_out'][:SHOWN])}")
    return "\n".join(lines)
