"""iabn-hub export: checkpoints as repositories of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import huggingface_hub

from ..checkpoints.catalogue import find, records
from ..checkpoints.errors import CheckpointError, UnknownNameError
from ..checkpoints.weights import WEIGHTS
from ..files import Digests, exclusive, md5_of, sha256_of
from ..publishing.export import Export, check, export_of, write_repository
from ..publishing.hub import Target, differences, push
from ..publishing.onnx import Onnx
from ..signing import RELEASE, SIGNATURE, sign
from .frame import FAILED, INTERRUPTED, OK, complain, complete_names, json_option, options, print_json

target_options = options(
    click.option("--to-dir", type=click.Path(path_type=Path), metavar="DIR", help="Write DIR/MODEL.TAG/."),
    click.option("--overwrite", is_flag=True, help="Write into a folder that holds other files too."),
    click.option("--repo", metavar="ORG[/NAME]", help="Upload to this repository."),
    click.option("--private", is_flag=True, help="A repository that is created is private."),
    click.option("--revision", metavar="BRANCH", help="Upload to this branch, created if missing."),
    click.option("--create-pr", is_flag=True, help="Upload as a pull request."),
)


@click.command("export")
@click.argument("names", metavar="[MODEL.TAG]…", nargs=-1, shell_complete=complete_names)
@click.option("--all", "everything", is_flag=True, help="Every checkpoint of the catalogue.")
@click.option("--from", "given", type=click.Path(path_type=Path), metavar="FILE|RUN",
              help="Take the weights from this file, snapshot or run.")  # fmt: skip
@click.option("--best", is_flag=True, help="Of a run, take the best epoch instead of the last.")
@target_options
@click.option("--onnx", is_flag=True, help="Also write model.onnx, checked in onnxruntime.")
@click.option("--int8", metavar="IMAGES", help="Also write model.int8.onnx, calibrated with these images.")
@click.option("--benchmark", metavar="ORG/DATASET:TASK",
              help="Also write .eval_results: the figures as results of this benchmark of the Hub.")  # fmt: skip
@click.option("--sign", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="KEY",
              help="Sign each with this private key (PEM, ECDSA), into model.sig and release.json.")  # fmt: skip
@click.option("--release", type=click.IntRange(min=1), default=1, show_default=True,
              help="A number that grows with each release; it is signed.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and upload nothing.")
@click.option(
    "--check",
    is_flag=True,
    help="Load what was written, and again what was uploaded, through timm: its logits must equal the source's.",
)
@json_option
def command(names: tuple[str, ...], everything: bool, **given: Any) -> int:
    """Export checkpoints to the Hugging Face Hub.

    Fetches and verifies the weights, converts and describes them, and uploads the repository.

    Each becomes model.safetensors, config.json (timm's), README.md (a model card), provenance.json (digests and
    versions), and recipe.json where its training is known. The same command writes the same files, and uploads nothing
    where nothing has changed. MODEL.TAG may be a pattern in quotes, such as 'resnet*'.

    --to-dir writes them to DIR/MODEL.TAG. --repo ORG/NAME uploads one checkpoint there, --repo ORG each to
    ORG/MODEL.TAG. Log in with 'hf auth login' before. --from takes a local file, whose md5 must be the published
    one, or a training run, which gets the name MODEL.TAG. --onnx adds the network for onnxruntime (pip install
    'iabn-hub[onnx]'), --int8 a quantised one as well: IMAGES is a file, a folder or a pattern of images like those of
    the training, of which up to 128 are taken. --sign signs all files under the name of the repository,
    ORG/NAME or MODEL.TAG; 'iabn-hub verify FOLDER --signature KEY' checks that.

    \b
    Examples:
      iabn-hub export resnext101_iabn.lr_512_in1k --to-dir export --check
      iabn-hub export --all --repo my-org --dry-run
      iabn-hub export resnet50_iabn.birds --from runs/birds --repo my-org/resnet50-birds --check --private
    """
    _check_usage(names, everything, given)
    chosen = list(records()) if everything else _matching(names, given["given"])
    if len(chosen) > 1 and (given["given"] or "/" in (given["repo"] or "")):
        raise click.UsageError(f"--from and --repo ORG/NAME are for one checkpoint, these are {len(chosen)}")
    rows: list[dict[str, Any]] = []
    try:
        for number, name in enumerate(chosen, start=1):
            print(f"[{number}/{len(chosen)}] {name}", file=sys.stderr)
            rows.append(_one(name, given))
    except KeyboardInterrupt:
        return complain("interrupted; the same command continues where it stopped", INTERRUPTED)
    finally:
        if given["as_json"]:
            print_json(rows)
    failed = [row["name"] for row in rows if "error" in row]
    if failed and len(chosen) > 1:
        complain(f"{len(failed)} of {len(chosen)} failed: {', '.join(failed)}")
    return FAILED if failed else OK


def _check_usage(names: tuple[str, ...], everything: bool, given: dict[str, Any]) -> None:
    if bool(names) == everything:
        raise click.UsageError("name the checkpoints, or pass --all")
    if not (given["to_dir"] or given["repo"] or given["dry_run"] or given["check"]):
        raise click.UsageError("name a target: --to-dir DIR, --repo ORG/NAME or both")
    if given["sign"] and not given["to_dir"]:
        raise click.UsageError("--sign needs --to-dir, where the signature is kept: each new one is another file")
    if given["benchmark"] and not re.fullmatch(r"[\w.-]+/[\w.-]+:[\w.-]+", given["benchmark"]):
        raise click.UsageError(f"--benchmark is {given['benchmark']!r}, not ORG/DATASET:TASK")
    if given["best"] and not given["given"]:
        raise click.UsageError("--best chooses an epoch of a run: name the run with --from")
    if given["repo"] and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given["repo"]):
        raise click.UsageError(f"--repo is {given['repo']!r}, not ORG or ORG/NAME")


def _matching(names: tuple[str, ...], given: Path | None) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        if given is not None:
            found[name] = None  # the name that a run gets
        elif any(sign in name for sign in "*?["):
            matching = fnmatch.filter(records(), name)
            if not matching:
                raise UnknownNameError(f"no checkpoint matches {name!r}; 'iabn-hub list' shows them")
            found.update(dict.fromkeys(matching))
        else:
            found[find(name).name] = None
    return list(found)


def _one(name: str, given: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    try:
        export = export_of(name, given["given"], given["best"])
        with _folder(given["to_dir"], export.name) as folder:
            _publish(export, folder, given, row)
    except UnknownNameError:
        raise
    except (CheckpointError, OSError, ValueError) as e:
        row["error"] = str(e)
        complain(e)
    return row


@contextlib.contextmanager
def _folder(to_dir: Path | None, name: str) -> Iterator[Path]:
    if to_dir is not None:
        with exclusive(to_dir / name):
            yield to_dir / name
        return
    with tempfile.TemporaryDirectory(prefix="iabn_hub-export-") as folder:
        yield Path(folder) / name


def _publish(export: Export, folder: Path, given: dict[str, Any], row: dict[str, Any]) -> None:
    """Export one checkpoint; what was done is added to `row`."""

    def report(text: str) -> None:
        if not given["as_json"]:
            print(text, flush=True)

    repo = given["repo"]
    if repo is not None and "/" not in repo:
        repo = f"{repo}/{export.name}"
    onnx = Onnx(given["int8"]) if given["onnx"] or given["int8"] else None
    files = write_repository(export, folder, repo, given["overwrite"], onnx, given["benchmark"])
    if given["sign"]:
        sign(folder, files, repo or export.name, given["release"], given["sign"])
        files |= {name: folder / name for name in (RELEASE, SIGNATURE)}
    sizes = {file: path.stat().st_size for file, path in files.items()}
    digests = Digests(md5_of(files[WEIGHTS]), sha256_of(files[WEIGHTS]))
    row |= {"source": dict(export.origin), "files": sizes, **digests._asdict()}
    if given["to_dir"]:
        row["folder"] = str(folder)
        report(f"{folder}: {sum(sizes.values()):,} bytes in {len(sizes)} files")
    if onnx is not None:
        row["onnx"] = onnx.found
        for name, found in onnx.found.items():
            report(f"  {name}: {_checked(found)}")
    if given["check"]:
        check(export, f"local-dir:{folder}")
        row["checked"] = ["folder"]
        report("  checked: timm loads the folder, and its logits equal the source's bit for bit")
    if given["dry_run"]:
        changes = differences(repo, files, given["revision"]) if repo else dict.fromkeys(files, "new")
        row["would_upload"] = changes
        for file, change in changes.items():
            report(f"  {change:<8} {file:<18} {sizes[file]:>14,} bytes")
    elif repo is not None:
        target = Target(repo, given["private"], given["revision"], given["create_pr"])
        report(_upload(export, target, files, row))
        if given["check"]:
            with tempfile.TemporaryDirectory(prefix="iabn_hub-check-") as cache:
                check(export, f"hf-hub:{repo}@{row['commit']}", Path(cache))
            row["checked"].append("hub")
            report("  checked: timm loads the repository at this commit, and its logits equal the source's bit for bit")


def _checked(found: dict[str, Any]) -> str:
    """What onnxruntime computed, as words."""
    if "difference" in found:
        return f"in onnxruntime the logits differ by {found['difference']:.0e} of the largest one"
    return (
        f"calibrated with {found['images']} images, for which the first class is that of float32 in "
        f"{found['agreement']:.1%}, and the mean cosine of the logits {found['cosine']:.4f}"
    )


def _upload(export: Export, target: Target, files: dict[str, Path], row: dict[str, Any]) -> str:
    """Upload what differs; returns a line for people."""
    message = f"{export.name}, converted from {export.origin['file']} (md5 {export.origin['md5']})"
    commit, changes = push(target, files, message)
    changed = [file for file, change in changes.items() if change != "same"]
    row |= {"repo": target.repo, "commit": commit, "uploaded": changed}
    # The entry of a catalogue that makes the repository a source of this checkpoint.
    row["catalogue"] = {
        "repo": target.repo, "revision": commit, "md5": row["md5"], "sha256": row["sha256"],
        "bytes": row["files"][WEIGHTS],
    }  # fmt: skip
    endpoint = huggingface_hub.constants.ENDPOINT
    return f"  {endpoint}/{target.repo} @ {commit}: {', '.join(changed) or 'nothing has changed'}"
