"""The command that publishes: `tools/export_to_hub.py MODEL.TAG …`."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub

from ..checkpoints.catalogue import find, records
from ..checkpoints.errors import CheckpointError, UnknownNameError
from ..checkpoints.verify import md5_of
from ..commands import FAILED, INTERRUPTED, OK, USAGE, complain
from .export import WEIGHTS, check, export_of, write_repository
from .hub import differences, push

PROGRAM = "export_to_hub.py"
DESCRIPTION = """Turn checkpoints into repositories of the Hugging Face Hub: fetch and verify, convert, describe, send.

Each becomes model.safetensors, config.json (timm's), README.md (a model card), provenance.json (digests and versions),
and recipe.json where its training is known. The same command gives the same files, and sends nothing where nothing has
changed.

--to-dir writes them to DIR/MODEL.TAG. --repo ORG/NAME sends one checkpoint there, --repo ORG each to ORG/MODEL.TAG.
Log in by 'hf auth login' before. --from takes a file that is here already, whose md5 must be the published one, or the
folder of a run of tools/train.py, which MODEL.TAG then names."""
EXAMPLES = """examples:
  python tools/export_to_hub.py resnext101_iabn.lr_512_in1k --to-dir export --check
  python tools/export_to_hub.py --all --repo my-org --dry-run
  python tools/export_to_hub.py resnet50_iabn.birds --from runs/birds --repo my-org/resnet50-birds --check --private
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("names", metavar="MODEL[.TAG]", nargs="*", help="or a pattern in quotes, such as 'resnet*'")
    p.add_argument("--all", action="store_true", help="every checkpoint of the catalogue")
    p.add_argument("--from", dest="given", type=Path, metavar="FILE|RUN", help="take the weights from here")
    where = p.add_argument_group("where they go")
    where.add_argument("--to-dir", type=Path, metavar="DIR", help="write DIR/MODEL.TAG/")
    where.add_argument("--overwrite", action="store_true", help="write into a folder that holds other files as well")
    where.add_argument("--repo", metavar="ORG[/NAME]", help="send them there")
    where.add_argument("--private", action="store_true", help="a repository that is made is private")
    where.add_argument("--revision", metavar="BRANCH", help="send to this branch, which is made if missing")
    where.add_argument("--create-pr", action="store_true", help="as a pull request")
    how = p.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    how.add_argument("--check", action="store_true", help="load what was written, and again what was sent, by timm: "
                     "its logits must be the source's, bit for bit")  # fmt: skip
    how.add_argument("--json", action="store_true", help="print JSON for a program instead of text for a person")
    return p


def main(recipes: Path, argv: list[str] | None = None) -> int:
    """Export; returns the exit code: 0 fine, 1 some failed, 2 wrong usage.

    Args:
        recipes: the folder with the recipes of published checkpoints.
    """
    p = parser()
    arguments = p.parse_args(argv)
    if bool(arguments.names) == arguments.all:
        p.error("name the checkpoints, or pass --all")
    if not (arguments.to_dir or arguments.repo or arguments.dry_run or arguments.check):
        p.error("say where they go: --to-dir DIR, --repo ORG/NAME or both")
    if arguments.repo and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", arguments.repo):
        p.error(f"--repo is {arguments.repo!r}, not ORG or ORG/NAME")
    try:
        names = list(records()) if arguments.all else _names(arguments)
        if len(names) > 1 and (arguments.given or (arguments.repo and "/" in arguments.repo)):
            p.error(f"--from and --repo ORG/NAME are for one checkpoint, these are {len(names)}")
    except UnknownNameError as e:
        return complain(PROGRAM, e, USAGE)
    except CheckpointError as e:
        return complain(PROGRAM, e, FAILED)
    rows = []
    try:
        for number, name in enumerate(names, start=1):
            print(f"[{number}/{len(names)}] {name}", file=sys.stderr)
            rows.append(_one(name, arguments, recipes))
    except UnknownNameError as e:
        return complain(PROGRAM, e, USAGE)
    except KeyboardInterrupt:
        return complain(PROGRAM, "interrupted; the same command goes on where it stopped", INTERRUPTED)
    finally:
        if arguments.json:
            print(json.dumps(rows, indent=1))
    failed = [row["name"] for row in rows if "error" in row]
    if failed and len(names) > 1:
        complain(PROGRAM, f"{len(failed)} of {len(names)} failed: {', '.join(failed)}", FAILED)
    return FAILED if failed else OK


def _names(arguments: argparse.Namespace) -> list[str]:
    found: dict[str, None] = {}
    for name in arguments.names:
        if arguments.given is not None:
            found[name] = None  # a run may have a name that nobody knows yet
        elif any(sign in name for sign in "*?["):
            matching = fnmatch.filter(records(), name)
            if not matching:
                raise UnknownNameError(f"no checkpoint matches {name!r}; 'iabn-hub list' shows them")
            found.update(dict.fromkeys(matching))
        else:
            found[find(name).name] = None
    return list(found)


def _one(name: str, arguments: argparse.Namespace, recipes: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    try:
        with _folder(arguments.to_dir, name) as folder:
            _publish(name, folder, arguments, recipes, row)
    except UnknownNameError:
        raise
    except (CheckpointError, OSError, ValueError) as e:
        row["error"] = str(e)
        complain(PROGRAM, e, FAILED)
    return row


@contextlib.contextmanager
def _folder(to_dir: Path | None, name: str) -> Iterator[Path]:
    if to_dir is not None:
        yield to_dir / name
        return
    with tempfile.TemporaryDirectory(prefix="iabn_hub-export-") as folder:
        yield Path(folder) / name


def _publish(name: str, folder: Path, arguments: argparse.Namespace, recipes: Path, row: dict[str, Any]) -> None:
    def say(text: str) -> None:
        if not arguments.json:
            print(text, flush=True)

    export = export_of(name, arguments.given, recipes)
    repo = arguments.repo if arguments.repo is None or "/" in arguments.repo else f"{arguments.repo}/{export.name}"
    files = write_repository(export, folder, repo, arguments.overwrite)
    sizes = {file: path.stat().st_size for file, path in files.items()}
    row |= {"source": dict(export.origin), "files": sizes, "md5": md5_of(files[WEIGHTS])}
    if arguments.to_dir:
        row["folder"] = str(folder)
        say(f"{folder}: {sum(sizes.values()):,} bytes in {len(sizes)} files")
    if arguments.check:
        check(export, f"local-dir:{folder}")
        row["checked"] = ["folder"]
        say("  checked: timm loads the folder, the logits are the source's bit for bit")
    if arguments.dry_run:
        row["would_send"] = done = differences(repo, files, arguments.revision) if repo else dict.fromkeys(files, "new")
        for file, what in done.items():
            say(f"  {what:<8} {file:<18} {sizes[file]:>14,} bytes")
        return
    if repo is None:
        return
    message = f"{export.name}, converted from {export.origin['file']} (md5 {export.origin['md5']})"
    commit, done = push(repo, files, message, arguments.private, arguments.revision, arguments.create_pr)
    changed = [file for file, what in done.items() if what != "same"]
    row |= {"repo": repo, "commit": commit, "sent": changed}
    # What makes the repository a source of this checkpoint in a catalogue.
    row["catalogue"] = {"repo": repo, "revision": commit, "md5": row["md5"]}
    say(f"  {huggingface_hub.constants.ENDPOINT}/{repo} @ {commit}: {', '.join(changed) or 'nothing has changed'}")
    if arguments.check:
        with tempfile.TemporaryDirectory(prefix="iabn_hub-check-") as cache:
            check(export, f"hf-hub:{repo}@{commit}", Path(cache))
        row["checked"].append("hub")
        say("  checked: timm loads the repository at this commit, the logits are the source's bit for bit")
