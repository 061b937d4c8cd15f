"""iabn-hub convert: files of weights from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..models import MODELS
from ..publishing.convert import LAYOUTS, convert
from .frame import json_option, print_json

SHOWN = 3


@click.command("convert")
@click.argument("given", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--arch",
    type=click.Choice(MODELS),
    metavar="NAME",
    help="Check that the weights fit this network, such as resnext101_iabn, and state it in the file.",
)
@click.option(
    "--norm-layer",
    type=click.Choice(["abn"]),
    help="'abn' writes the weights of the same network with standard BatchNorm: |w| + eps becomes the weight.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
def command(given: Path, out: Path, arch: str | None, norm_layer: str | None, overwrite: bool, as_json: bool) -> None:
    """Convert a file of weights to another layout.

    The suffix of OUT decides: .safetensors has the names of iabn_hub; .pth, .pth.tar and .pt have the names of
    mapillary/inplace_abn, written by torch.save with tensors only (its scripts read no other format). IN may be any of
    them, or a training snapshot; what is not a tensor is dropped. Code in a pickle is refused, never run.

    \b
    Examples:
      iabn-hub convert resnext101_ipabn_lr_512.pth.tar model.safetensors --arch resnext101_iabn
      iabn-hub convert model.safetensors for_inplace_abn.pth.tar
      iabn-hub convert model.safetensors batchnorm.safetensors --arch resnext101_iabn --norm-layer abn
    """
    if out.suffix not in LAYOUTS:
        raise click.UsageError(f"OUT is {out}: its suffix must be one of {', '.join(LAYOUTS)}")
    if out.exists() and not overwrite:
        raise click.UsageError(f"{out} exists already: name another file, or pass --overwrite")
    report = convert(given, out, arch, norm_layer)
    print_json(report) if as_json else print(_text(report))


def _text(report: dict[str, Any]) -> str:
    renamed = list(report["renamed"].items())
    lines = [
        f"{report['out']}: {report['from']} to {report['to']}, {report['tensors']:,} tensors, "
        f"{report['bytes']:,} bytes, md5 {report['md5']}",
        f"  {len(renamed):,} renamed" + "".join(f"\n    {old} → {new}" for old, new in renamed[:SHOWN]),
    ]
    lines += ["    …"] if len(renamed) > SHOWN else []
    if report["left_out"]:
        lines.append(f"  dropped, not tensors: {', '.join(report['left_out'][:SHOWN])}")
    return "\n".join(lines)
