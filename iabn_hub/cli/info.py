"""iabn-hub info: what is known of one checkpoint."""

from __future__ import annotations

from typing import Any

import click

from ..checkpoints.catalogue import Result
from ..checkpoints.fetch import verified_file
from ..models.pretrained import find_checkpoint
from .frame import complete_names, json_option, print_json

SHOWN = (
    "description", "task", "dataset", "num_classes", "parameters", "license", "license_link", "citation",
    "md5", "bytes", "layout", "file", "package", "google_drive_id", "hub", "catalogue", "cached",
)  # fmt: skip


@click.command("info")
@click.argument("name", metavar="NAME", shell_complete=complete_names)
@json_option
def command(name: str, as_json: bool) -> None:
    """Show what is known of a checkpoint.

    NAME is model or model.tag. Shows accuracy by protocol, training settings, licence, source, and the cached file.
    """
    record = find_checkpoint(name)
    path = verified_file(record)
    facts: dict[str, Any] = {**record.to_dict(), "name": record.name, "cached": str(path) if path else None}
    if as_json:
        print_json(facts)
        return
    print(record.name)
    for key in SHOWN:
        if facts[key] not in (None, ""):
            print(f"  {key:<16} {' '.join(str(facts[key]).split())}")
    for result in record.results:
        print(f"  {'result':<16} {_figures(result)}")
    print(f"  {'input':<16} {record.input}")
    for key, value in record.training.items():
        print(f"  {'training.' + key:<16} {value}")


def _figures(result: Result) -> str:
    figures = {"top-1": result.top1, "top-5": result.top5, "mIoU": result.miou}
    text = ", ".join(f"{name} {value:.2f} %" for name, value in figures.items() if value is not None)
    parts = [f"shorter side {result.resize}"] if result.resize else []
    parts += [f"{'ten crops' if result.ten_crop else 'centre crop'} of {result.crop}"] if result.crop else []
    parts += [result.note] if result.note else []
    return f"{result.protocol}: {text} on {result.dataset}" + (f" ({', '.join(parts)})" if parts else "")
