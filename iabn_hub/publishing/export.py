"""A checkpoint as a folder that timm, torch.hub and the Hub understand, with its origin written down.

The same weights, versions and arguments give the same bytes.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from .. import __version__
from ..checkpoints.catalogue import Checkpoint, Result, find, records
from ..checkpoints.errors import CheckpointError, ChecksumError, UnknownNameError
from ..checkpoints.export import save_safetensors, write_atomically
from ..checkpoints.fetch import fetch_checkpoint
from ..checkpoints.verify import md5_of, sha256_of
from ..training.sources import Source, load_source
from .card import model_card

CONVERTER = "1"  # of what this module makes of a file; raised when the same file would give other weights
WEIGHTS, CONFIG, CARD, RECIPE, PROVENANCE = (
    "model.safetensors", "config.json", "README.md", "recipe.json", "provenance.json",
)  # fmt: skip
LARGEST_SIDE = 128  # pixels of the image that a check shows to both networks
KINDS = {"legacy": "legacy file", "iabn_hub": "file of iabn_hub"}
PACKAGES = ("torch", "timm", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Export:
    """What is to be published.

    Args:
        name: `model.tag`.
        source: the network with its weights.
        origin: where they come from: `kind`, `file`, `bytes`, `md5`, `sha256`, and `google_drive_id` where known.
        command: what makes the same export again.
        recipe: the settings of the training, as JSON.
        results: its figures.
    """

    name: str
    source: Source
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


def export_of(name: str, given: Path | None, recipes: Path) -> Export:
    """The weights of a record or, with `given`, of a file of it or of a run.

    Args:
        name: `model.tag` or `model`; of a run, the name that it shall have.
        given: the record's file, whose md5 must be the published one; or the folder or a snapshot of a run.
        recipes: where the recipe of a record lies under its name.

    Raises:
        UnknownNameError: no such record.
        CheckpointError: the weights cannot be had, verified or loaded.
    """
    if given is not None and (given.is_dir() or given.suffix == ".pt"):
        return _of_run(name, given)
    record = find(name)
    path = fetch_checkpoint(record) if given is None else _verified(record, given)
    source = load_source(record.name, checkpoint=None if given is None else str(given))
    recipe = recipes / f"{record.name}.json"
    origin = _digests(path) | {"kind": KINDS[record.layout], "file": record.filename}
    if record.google_drive_id:
        origin["google_drive_id"] = record.google_drive_id
    return Export(
        record.name, source, origin, f"python tools/export_to_hub.py {record.name}",
        recipe.read_text() if recipe.is_file() else None, record.results, record.dataset, record.license,
        record.license_link, record.citation, record.description, record.training,
    )  # fmt: skip


def _verified(record: Checkpoint, path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    found = md5_of(path)
    if found != record.md5:
        raise ChecksumError(
            f"{record.name}: {path} has md5 {found}, expected {record.md5}: this is not the published file. It was not "
            "exported under this name; weights of your own belong into a catalogue of your own (IABN_HUB_CATALOGUE)"
        )
    return path


def _of_run(name: str, place: Path) -> Export:
    source = load_source(str(place))
    model, _, tag = name.partition(".")
    if model != source.arch or not tag:
        raise UnknownNameError(f"{place} holds a {source.arch}: name it {source.arch}.TAG, not {name!r}")
    if name in records():
        raise UnknownNameError(f"{name} is a published checkpoint, and {place} another: choose another tag")
    folder = place if place.is_dir() else place.parent.parent
    weights = place if place.is_file() else place / WEIGHTS
    weights = weights if weights.is_file() else place / "snapshots" / "best.pt"
    recipe, metrics = folder / RECIPE, folder / "metrics.json"
    results: tuple[Result, ...] = ()
    if place.is_dir() and weights.name == WEIGHTS and metrics.is_file():
        result = json.loads(metrics.read_text())["result"]
        figures = {key: result[key] for key in ("top1", "top5", "miou") if key in result}
        images = source.input
        results = (
            (Result(str(images.crop_val), "held out", **figures, resize=images.scale_val, crop=images.crop_val),)
            if source.task == "classification"
            else (Result(str(source.longest), "held out", **figures),)
        )
    return Export(
        name, source, _digests(weights) | {"kind": "run of tools/train.py", "file": weights.name},
        f"python tools/export_to_hub.py {name} --from RUN", recipe.read_text() if recipe.is_file() else None, results,
    )  # fmt: skip


def _digests(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "md5": md5_of(path), "sha256": sha256_of(path)}


def write_repository(export: Export, folder: Path, repo: str | None, overwrite: bool = False) -> dict[str, Path]:
    """Write the files of a repository, the provenance last; returns them by name.

    Args:
        folder: made if missing; one that holds other files is left alone unless `overwrite`.
        repo: ORG/NAME for the card's examples.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: it cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROVENANCE).is_file() and not overwrite:
        raise FileExistsError(f"{folder}: holds other files: name another folder, or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    written = {WEIGHTS: folder / WEIGHTS}
    save_safetensors(_plain(export.source.model), written[WEIGHTS], _metadata(export))
    contents = {CONFIG: _config(export), CARD: model_card(export, repo).encode()}
    if export.recipe is not None:
        contents[RECIPE] = export.recipe.encode()
    for name, content in contents.items():
        written[name] = folder / name
        write_atomically(written[name], content)
    written[PROVENANCE] = folder / PROVENANCE
    write_atomically(written[PROVENANCE], _provenance(export, written))
    return written


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
    source = export.source
    options = {key: value for key, value in source.options.items() if key != "num_classes"}
    if options.get("norm_layer") == "iabn_sync":
        options["norm_layer"] = "iabn"  # it is the same once it is trained
    config: dict[str, Any] = {"model_args": options}
    cfg: dict[str, Any] = source.model.pretrained_cfg  # type: ignore[assignment]
    extra = {"tag": export.name.partition(".")[2], "license": export.license or None}
    config["pretrained_cfg"] = {key: value for key, value in extra.items() if value}
    if source.record is None:  # timm's description of a new network is of its default, not of this one's training
        images = source.input
        crop = cfg["input_size"][-1] if source.task == "segmentation" else images.crop_val
        scale = max(images.scale_val, crop) if source.task == "classification" else crop
        config["pretrained_cfg"] |= {
            "input_size": [3, crop, crop], "crop_pct": crop / scale, "interpolation": "bilinear",
            "mean": list(images.mean), "std": list(images.std),
        }  # fmt: skip
    if source.task == "segmentation":
        config |= {"longest": source.longest, "ignore": source.ignore}
    if source.classes and (source.record is None or source.record.dataset != "imagenet-1k"):
        config["label_names"] = list(source.classes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(source.model, str(path), config)
        content = json.loads(path.read_text())
    content["model_args"].pop("num_classes", None)  # else a classifier of another size would be replaced, not refused
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _provenance(export: Export, written: Mapping[str, Path]) -> bytes:
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in sorted(written.items())
        if name != PROVENANCE
    }  # fmt: skip
    versions = {"iabn_hub": __version__, "python": platform.python_version()}
    facts = {
        "name": export.name,
        "source": dict(export.origin),
        "files": files,
        "command": export.command,
        "converter": CONVERTER,
        "versions": versions | {package: version(package) for package in PACKAGES},
    }
    return (json.dumps(facts, indent=2) + "\n").encode()


def check(export: Export, where: str, cache: Path | None = None) -> None:
    """Load what was written by timm, and compare its logits with the source's, bit for bit.

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
    source: Any = export.source.model
    side = min(LARGEST_SIDE, source.pretrained_cfg["input_size"][-1])
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = source.eval()(image), loaded.eval()(image)
    if expected.shape != found.shape or not expected.equal(found):
        raise CheckpointError(f"{where}: loads, but its logits are not those of {export.source.text}")
