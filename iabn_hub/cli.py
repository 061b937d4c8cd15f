"""The command `iabn-hub`. Exit codes: 0 fine, 1 something failed, 2 wrong usage (an unknown name is one)."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .checkpoints.catalogue import Checkpoint, checkpoints_of, find, records
from .checkpoints.errors import CheckpointError, UnknownNameError
from .checkpoints.fetch import cached_files, fetch_checkpoint, local_file
from .checkpoints.mirrors import verify_mirror
from .checkpoints.verify import is_verified, md5_of, recheck
from .classify import DEFAULT_MODEL, SAMPLES, Classifier
from .commands import FAILED, INTERRUPTED, OK, USAGE, complain
from .doctor import examine
from .images import ImageError
from .models import ARCHITECTURES, create_model, in_repository
from .processes import usable_device
from .segmentation import command as segmentation

PROGRAM = "iabn-hub"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except UnknownNameError as e:
        return complain(PROGRAM, e, USAGE)
    except CheckpointError as e:
        return complain(PROGRAM, e, FAILED)
    except BrokenPipeError:  # `iabn-hub list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as e:
        return complain(PROGRAM, f"{e.filename or 'output'}: {e.strerror or e}", FAILED)
    except KeyboardInterrupt:
        return complain(PROGRAM, "interrupted", INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iabn-hub",
        description="Pretrained convolutional networks with in-place activated BatchNorm: find, fetch, verify, use.",
        epilog="Without arguments, 'iabn-hub classify' shows the bundled network at work, offline. "
        "Environment: IABN_HUB_CACHE (folder for weights), IABN_HUB_MIRROR (http://, https:// or file:// base URL), "
        "IABN_HUB_CATALOGUE (further catalogue files), IABN_HUB_OFFLINE=1 (never download).",
    )
    parser.add_argument("--version", action="version", version=f"iabn-hub {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text.partition("\n")[0], description=text)
        sub.add_argument("--json", action="store_true", help="print JSON for a program instead of text for a person")
        sub.set_defaults(run=run)
        return sub

    command("list", _list, "Show all checkpoints, and the models that have none.")
    one = command("info", _info, "Show all that is known of a checkpoint: accuracy, training, licence, source.")
    one.add_argument("name", metavar="NAME", help="model or model.tag")
    some = command("fetch", _fetch, "Download checkpoints into the cache and verify their md5.")
    some.add_argument("names", metavar="NAME", nargs="+", help="model or model.tag")
    any_ = command("verify", _verify, "Read cached checkpoints again and compare their md5 with the published one.")
    any_.add_argument("names", metavar="NAME", nargs="*", help="model or model.tag (default: all that are cached)")
    any_.add_argument("--mirror", metavar="DIR", type=Path, help="check what tools/make_mirror.py built there instead")
    command("doctor", _doctor, "Show which kernels the layer uses here and why, and check that they compute the same.")
    classify = command("classify", _classify, "Name what is in images.")
    classify.add_argument("images", metavar="IMAGE", nargs="*", help="image files (default: the bundled samples)")
    classify.add_argument(
        "--model",
        metavar="NAME[.TAG]",
        help="or hf-hub:ORG/NAME (default: the bundled test network, which reads digits)",
    )
    classify.add_argument("--checkpoint", metavar="FILE", help="load this file of weights instead of fetching")
    classify.add_argument("--topk", type=_positive, default=5, metavar="K", help="classes to show (default: 5)")
    classify.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    segment = command("segment", segmentation.run, segmentation.DESCRIPTION)
    segment.formatter_class = argparse.RawDescriptionHelpFormatter
    segmentation.add_arguments(segment)
    return parser


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def where(record: Checkpoint) -> Path | None:
    """The verified file of a checkpoint on this machine, or None; downloads nothing."""
    local = local_file(record)
    if local:
        return local if local.is_file() and md5_of(local) == record.md5 else None
    return next((path for path, md5 in cached_files(record) if is_verified(path, md5)), None)


def _find(name: str) -> Checkpoint:
    """`find`, which knows checkpoints only, with a better answer for an architecture that has none."""
    if name in ARCHITECTURES and not checkpoints_of(name):
        raise UnknownNameError(f"no weights are published for {name}; 'iabn-hub list' shows what exists")
    return find(name)


def _list(arguments: argparse.Namespace) -> int:
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
                "cached": where(record) is not None,
            }
        )
    for model in ARCHITECTURES:
        if not checkpoints_of(model):
            rows.append({"model": model, "tag": None, "task": "classification", "top1_224": None, "cached": False})
    for row in rows:
        if row.get("parameters") is None and row["model"] in ARCHITECTURES:
            network = create_model(row["model"], device="meta")
            row["parameters"] = sum(p.numel() for p in network.parameters())
    if arguments.json:
        _print_json(rows)
        return OK
    print(f"{'model':<28} {'tag':<18} {'parameters':>11} {'top-1 at 224':>13}  cached")
    for row in rows:
        count, top1 = row.get("parameters"), row["top1_224"]
        print(
            f"{row['model']:<28} {row['tag'] or '-':<18} {f'{count / 1e6:.1f} M' if count else '-':>11} "
            f"{f'{top1:.2f} %' if top1 is not None else '-':>13}  "
            f"{('yes' if row['cached'] else 'no') if row['tag'] else '-'}"
        )
    return OK


def _info(arguments: argparse.Namespace) -> int:
    record = _find(arguments.name)
    path = where(record)
    facts = {**record.to_dict(), "name": record.name, "cached": str(path) if path else None}
    if arguments.json:
        _print_json(facts)
        return OK
    print(record.name)
    shown = (
        "description", "task", "dataset", "num_classes", "parameters", "license", "license_link", "citation",
        "md5", "layout", "file", "google_drive_id", "hub", "catalogue", "cached",
    )  # fmt: skip
    for key in shown:
        if facts[key] not in (None, ""):
            print(f"  {key:<16} {facts[key]}")
    for result in record.results:
        figures = {"top-1": result.top1, "top-5": result.top5, "mIoU": result.miou}
        text = ", ".join(f"{k} {v:.2f} %" for k, v in figures.items() if v is not None)
        print(f"  {'result':<16} {result.protocol}: {text} on {result.dataset}{_protocol(asdict(result))}")
    print(f"  {'input':<16} {record.input}")
    for key, value in record.training.items():
        print(f"  {'training.' + key:<16} {value}")
    return OK


def _protocol(result: dict[str, Any]) -> str:
    parts = [f"shorter side {result['resize']}"] if result["resize"] else []
    parts += [f"{'ten crops' if result['ten_crop'] else 'centre crop'} of {result['crop']}"] if result["crop"] else []
    parts += [result["note"]] if result["note"] else []
    return f" ({', '.join(parts)})" if parts else ""


def _fetch(arguments: argparse.Namespace) -> int:
    wanted = [_find(name) for name in arguments.names]  # a typing mistake ends it before the first download
    rows: list[dict[str, Any]] = []
    for record in wanted:
        try:
            path = fetch_checkpoint(record)
            rows.append({"name": record.name, "path": str(path), "bytes": path.stat().st_size})
            if not arguments.json:
                print(f"{record.name}  {path}  {path.stat().st_size:,} bytes, md5 verified")
        except CheckpointError as e:
            rows.append({"name": record.name, "error": str(e)})
            complain(PROGRAM, e, FAILED)
    if arguments.json:
        _print_json(rows)
    return FAILED if any("error" in row for row in rows) else OK


def _verify(arguments: argparse.Namespace) -> int:
    rows = _verify_cached(arguments.names) if arguments.mirror is None else verify_mirror(arguments.mirror)
    again = "'iabn-hub fetch {}' gets it" if arguments.mirror is None else "tools/make_mirror.py puts {} there"
    if arguments.json:
        _print_json(rows)
    else:
        for row in rows:
            wrong = row["status"] == "wrong"
            detail = f": md5 {row['md5']}, expected {row['expected_md5']}; delete it" if wrong else ""
            hint = f"; {again.format(row['name'])}" if row["status"] != "ok" else ""
            print(f"{row['status']:<8} {row['name']}  {row['path']}{detail}{hint}")
    return OK if all(row["status"] == "ok" for row in rows) else FAILED


def _verify_cached(names: list[str]) -> list[dict[str, Any]]:
    wanted = [_find(name) for name in names] or list(records().values())
    rows = []
    for record in wanted:
        local = local_file(record)
        files = [(local, record.md5)] if local else cached_files(record)
        present = [(path, md5) for path, md5 in files if path.is_file()]
        if not present and names:
            rows.append({"name": record.name, "status": "missing", "path": str(files[0][0])})
        for path, md5 in present:
            found = md5_of(path) if local else recheck(path)
            status = "ok" if found == md5 else "wrong"
            rows.append({"name": record.name, "status": status, "path": str(path), "expected_md5": md5, "md5": found})
    return rows


def _doctor(arguments: argparse.Namespace) -> int:
    facts = examine()
    if arguments.json:
        _print_json(facts)
    else:
        print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
        for key in ("machine", "threads", "instruction_sets", "compiler", "ninja", "cuda_toolkit", "cache_folder"):
            value = facts[key]
            print(f"  {key:<17} {', '.join(value) if isinstance(value, list) else value}")
        for name, device in facts["devices"].items():
            print(f"{name}: {device['backend']} kernels, {device['reason']}")
            for key in ("library", "loss", "self_check"):
                if device[key]:
                    print(f"  {key:<17} {device[key]}")
    return OK if facts["healthy"] else FAILED


def _classify(arguments: argparse.Namespace) -> int:
    images = arguments.images
    if not images:
        if arguments.model or arguments.checkpoint is not None:
            return complain(PROGRAM, "name at least one image, or leave --model out for the bundled samples", USAGE)
        images = [str(path) for path in sorted(SAMPLES.glob("*.png"))]
    try:
        usable_device(arguments.device)
    except ValueError as e:
        return complain(PROGRAM, e, USAGE)
    model = arguments.model or DEFAULT_MODEL
    if arguments.checkpoint is None and not in_repository(model):
        _find(model)
    classifier = Classifier(model, checkpoint=arguments.checkpoint, device=arguments.device)
    rows: list[dict[str, Any]] = []
    if not arguments.json:
        print(f"model: {classifier.name}")
    for image in images:
        try:
            guesses = classifier.classify(image, arguments.topk)
        except ImageError as e:
            rows.append({"image": image, "error": str(e)})
            complain(PROGRAM, e, FAILED)
            continue
        rows.append({"image": image, "predictions": [asdict(guess) for guess in guesses]})
        if not arguments.json:
            print(image)
            for guess in guesses:
                print(f"  {100 * guess.probability:6.2f} %  {guess.label}")
    if arguments.json:
        _print_json({"model": classifier.name, "images": rows})
    return FAILED if any("error" in row for row in rows) else OK
