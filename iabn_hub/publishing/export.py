"""Export a checkpoint as a folder that timm, torch.hub and the Hub can load, with its provenance.

The same weights, versions and arguments give the same bytes.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoints.catalogue import TAG, Result, find, records
from ..checkpoints.errors import CheckpointError, UnknownNameError
from ..checkpoints.fetch import fetch_checkpoint
from ..checkpoints.verify import require_digests
from ..checkpoints.weights import WEIGHTS, save_safetensors
from ..files import FOLDER_LOCK, md5_of, sha256_of, write_atomically
from ..models.pretrained import Pretrained, load_pretrained
from ..models.timm_config import config_text, timm_config
from ..recipes import RECIPES
from ..schema import load_json
from ..versions import versions
from .card import PICTURES, eval_results, model_card
from .onnx import INT8, ONNX, Onnx
from .onnx import PACKAGES as ONNX_PACKAGES
from .runs import facts_of_run, weights_of_run

CONVERTER = "1"  # of what this module makes of a file; raised when the same file would give other weights
CONFIG, CARD, RECIPE, PROVENANCE = "config.json", "README.md", "recipe.json", "provenance.json"
EVAL_RESULTS = ".eval_results/"
LARGEST_SIDE = 128  # pixels of the image that a check shows to both networks
KINDS = {
    "legacy": "legacy file",
    "iabn_hub": "file of iabn_hub",
    "efficientnet_pytorch": "file of efficientnet_pytorch",
}
NOT_PUBLISHED = (
    "this is not the published file. Export weights of your own through a catalogue of your own (IABN_HUB_CATALOGUE)"
)
PACKAGES = ("torch", "timm", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Export:
    """What is to be published.

    Args:
        name: `model.tag`.
        network: with its weights.
        origin: where they come from: `kind`, `file`, `bytes`, `md5`, `sha256`, and `google_drive_id` where known.
        command: the command that repeats the export.
        recipe: the settings of the training, as JSON.
        results: its figures.
        pictures: files that the card shows.
    """

    name: str
    network: Pretrained
    origin: Mapping[str, Any]
    command: str
    recipe: str | None = None
    results: tuple[Result, ...] = ()
    dataset: str = ""
    license: str = ""
    license_link: str = ""
    citation: str = ""
    description: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)


def export_of(name: str, given: Path | None = None, best: bool = False) -> Export:
    """The weights of a record or, with `given`, of a file of it or of a run.

    Args:
        name: `model.tag` or `model`; of a run, the name that it shall have.
        given: the record's file, whose md5 must be the published one; or the folder or a snapshot of a run.
        best: of the folder of a run, take the best epoch instead of the last.

    Raises:
        UnknownNameError: no such record.
        CheckpointError: the weights cannot be had, verified or loaded.
    """
    if given is not None and (given.is_dir() or given.suffix == ".pt"):
        return _of_run(name, given, best)
    if best:
        raise CheckpointError(f"{given}: only the folder of a run has a best epoch")
    record = find(name)
    if given is None:
        path = fetch_checkpoint(record)
    else:
        path = require_digests(given, record.digests, record.name, NOT_PUBLISHED)
    network = load_pretrained(record.name, checkpoint=None if given is None else str(given))
    recipe = RECIPES / f"{record.name}.json"
    origin = _digests(path) | {"kind": KINDS[record.layout], "file": record.filename}
    if record.google_drive_id:
        origin["google_drive_id"] = record.google_drive_id
    if record.package:
        origin["package"] = record.package.name
    return Export(
        record.name, network, origin, f"iabn-hub export {record.name}",
        recipe.read_text() if recipe.is_file() else None, record.results, record.dataset, record.license,
        record.license_link, record.citation, record.description, record.training,
    )  # fmt: skip


def _of_run(name: str, place: Path, best: bool) -> Export:
    source = weights_of_run(place, best)
    network = load_pretrained(str(source))
    model, _, tag = name.partition(".")
    if model != network.arch or not TAG.fullmatch(tag):
        raise UnknownNameError(
            f"{place} holds a {network.arch}: name it {network.arch}.TAG, not {name!r}; a tag consists of letters, "
            "digits, '_' and '-'"
        )
    if name in records():
        raise UnknownNameError(f"{name} is a published checkpoint, and {place} another: choose another tag")
    facts = facts_of_run(source, network)
    return Export(
        name, network, _digests(source) | {"kind": "training run", "file": source.name},
        f"iabn-hub export {name} --from RUN" + (" --best" if best else ""), facts.recipe, facts.results,
        training=facts.training, description=facts.description, pictures=facts.pictures,
    )  # fmt: skip


def _digests(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "md5": md5_of(path), "sha256": sha256_of(path)}


def write_repository(
    export: Export,
    folder: Path,
    repo: str | None,
    overwrite: bool = False,
    onnx: Onnx | None = None,
    benchmark: str | None = None,
) -> dict[str, Path]:
    """Write the files of a repository, the provenance last; returns them by name.

    Args:
        folder: made if missing; one that holds other files is left alone unless `overwrite`.
        repo: ORG/NAME for the card's examples.
        onnx: write ONNX files too.
        benchmark: ORG/DATASET:TASK, of which the figures are results; written to .eval_results.

    Raises:
        FileExistsError: the folder holds something else.
        CheckpointError: an ONNX file computes something else, or there are no figures.
        OSError: it cannot be written.
    """
    others = folder.is_dir() and any(each.name != FOLDER_LOCK for each in folder.iterdir())
    if others and not (folder / PROVENANCE).is_file() and not overwrite:
        raise FileExistsError(f"{folder}: holds other files: name another folder, or pass --overwrite")
    contents = {} if onnx is None else onnx.contents(export.network)
    contents |= {CONFIG: _config(export), CARD: model_card(export, repo, contents).encode()}
    if export.recipe is not None:
        contents[RECIPE] = export.recipe.encode()
    contents |= {name: path.read_bytes() for name, path in export.pictures.items()}
    if benchmark is not None:
        dataset = benchmark.partition(":")[0].partition("/")[2]
        contents[f"{EVAL_RESULTS}{dataset}.yaml"] = eval_results(export, benchmark)
    folder.mkdir(parents=True, exist_ok=True)  # now that nothing is left to be refused
    written = {WEIGHTS: folder / WEIGHTS}
    save_safetensors(_plain(export.network.model), written[WEIGHTS], _metadata(export))
    for name, content in contents.items():
        written[name] = folder / name
        written[name].parent.mkdir(exist_ok=True)
        write_atomically(written[name], content)
    written[PROVENANCE] = folder / PROVENANCE
    more = "" if onnx is None else f" --int8 {shlex.quote(onnx.images)}" if onnx.images else " --onnx"
    more += f" --benchmark {benchmark}" if benchmark else ""
    packages = PACKAGES if onnx is None else (*PACKAGES, *ONNX_PACKAGES)
    for path in _left_over(folder, written):
        path.unlink()
    write_atomically(written[PROVENANCE], _provenance(export, written, export.command + more, packages))
    return written


def _left_over(folder: Path, written: Collection[str]) -> Iterator[Path]:
    """Files of an earlier export, as its provenance states them, which this one has not written again."""
    try:
        listed = load_json(folder / PROVENANCE, CheckpointError)
    except CheckpointError:  # there is none, or one that cannot be read, and will be replaced
        return
    files = listed.get("files") if isinstance(listed, dict) else None
    for name, facts in (files if isinstance(files, dict) else {}).items():
        path = folder / name
        optional = name in (ONNX, INT8, RECIPE, *PICTURES) or re.fullmatch(r"\.eval_results/[\w.-]+\.yaml", name)
        left = optional and name not in written and path.is_file()
        if left and isinstance(facts, dict) and sha256_of(path) == facts.get("sha256"):
            yield path


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """The weights on the CPU in float32, each with memory of its own."""
    state = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        state[name] = (value.float() if value.is_floating_point() else value).clone(
            memory_format=torch.contiguous_format
        )
    return state


def _metadata(export: Export) -> dict[str, str]:
    arch, _, tag = export.name.partition(".")
    facts = {
        "arch": arch,
        "tag": tag,
        "source": f"{export.origin['kind']} {export.origin['file']}",
        "source_md5": str(export.origin["md5"]),
        "converter": CONVERTER,
        "license": export.license,
        "iabn_hub": __version__,
    }
    return {name: value for name, value in facts.items() if value}


def _config(export: Export) -> bytes:
    network = export.network
    extra = {"tag": export.name.partition(".")[2], "license": export.license or None}
    # ImageNet's names are known to whoever reads the configuration.
    classes = None if network.record and network.record.dataset == "imagenet-1k" else network.classes
    config = timm_config(
        network.model, network.options, network.evaluation, classes, network.task == "segmentation",
        **{key: value for key, value in extra.items() if value},
    )  # fmt: skip
    return config_text(config)


def _provenance(export: Export, written: Mapping[str, Path], command: str, packages: Iterable[str]) -> bytes:
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in sorted(written.items())
        if name != PROVENANCE
    }  # fmt: skip
    facts = {
        "name": export.name,
        "source": dict(export.origin),
        "files": files,
        "command": command,
        "converter": CONVERTER,
        "versions": versions(packages),
    }
    return (json.dumps(facts, indent=2) + "\n").encode()


def check(export: Export, where: str, cache: Path | None = None) -> None:
    """Load an exported repository through timm, and compare its logits with those of the source, bit for bit.

    Args:
        where: 'local-dir:…' or 'hf-hub:…'.
        cache: the folder for what is downloaded.

    Raises:
        CheckpointError: it does not load, or computes something else.
    """
    try:
        loaded = timm.create_model(where, pretrained=True, cache_dir=cache)
    except Exception as e:  # whatever timm and the Hub's client make of what they find
        raise CheckpointError(f"{where}: does not load: {str(e).strip() or type(e).__name__}") from e
    source: Any = export.network.model
    side = min(LARGEST_SIDE, source.pretrained_cfg["input_size"][-1])
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = source.eval()(image), loaded.eval()(image)
    if expected.shape != found.shape or not expected.equal(found):
        raise CheckpointError(f"{where}: loads, but its logits differ from those of {export.network.name}")
