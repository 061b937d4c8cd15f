"""iabn-hub list: the checkpoints, and the architectures without weights."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from ..checkpoints.catalogue import checkpoints_of, records
from ..checkpoints.fetch import verified_file
from ..models import ARCHITECTURES, create_model
from .frame import console, json_option, print_json


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """Show all checkpoints, and the architectures that have none."""
    rows = _rows()
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "tag", "parameters", "top-1 at 224", "cached"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("parameters", "top-1 at 224") else "left")
    for row in rows:
        count, top1 = row["parameters"], row["top1_224"]
        table.add_row(
            row["model"],
            row["tag"] or "-",
            f"{count / 1e6:.1f} M" if count else "-",
            f"{top1:.2f} %" if top1 is not None else "-",
            ("yes" if row["cached"] else "no") if row["tag"] else "-",
        )
    console().print(table)


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for record in records().values():
        at_224 = record.result("224")
        rows.append(
            {
                "model": record.model,
                "tag": record.tag,
                "task": record.task,
                "parameters": record.parameters,
                "top1_224": at_224.top1 if at_224 else None,
                "cached": verified_file(record) is not None,
            }
        )
    rows += [
        {"model": name, "tag": None, "task": "classification", "parameters": None, "top1_224": None, "cached": False}
        for name in ARCHITECTURES
        if not checkpoints_of(name)
    ]
    for row in rows:
        if row["parameters"] is None and row["model"] in ARCHITECTURES:
            network = create_model(row["model"], device="meta")
            row["parameters"] = sum(p.numel() for p in network.parameters())
    return rows
