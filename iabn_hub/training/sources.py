"""Networks with weights, from whatever names them: the catalogue, a run of `tools/train.py`, a snapshot, a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import timm.data
from torch import nn

from ..checkpoints.catalogue import Checkpoint, find
from ..checkpoints.errors import CheckpointError
from ..checkpoints.fit import count_classes
from ..checkpoints.weights import read_weights
from ..classify import labels_of
from ..layers import ABN, InPlaceABN
from ..models import MODELS, SEGMENTERS, create_model, in_repository
from ..models.transfer import transfer
from .network import options_of
from .recipe import InputSection, SegmentationSection, recipe_from
from .snapshots import BEST, read_snapshot


@dataclass(frozen=True)
class Source:
    """A network with its weights; `options` and `arch` would create another like it.

    `input` has the sizes that the weights were validated with, `longest` the longer side that a segmentation network is
    shown, `ignore` the number in its label files that counts as nothing; `classes` are their names, where known.
    """

    model: nn.Module
    arch: str
    options: dict[str, Any]
    text: str
    input: InputSection
    classes: tuple[str, ...] | None = None
    record: Checkpoint | None = None
    changes: list[str] = field(default_factory=list)
    longest: int = SegmentationSection.longest_val
    ignore: int = SegmentationSection.ignore

    @property
    def task(self) -> str:
        """'classification' or 'segmentation'."""
        return "segmentation" if self.arch in SEGMENTERS else "classification"

    def rebuilt(self, **options: Any) -> Source:
        """The same weights in a network created with other options; `changes` says what differs."""
        options = {**self.options, **options}
        standard = any(isinstance(m, ABN) and not isinstance(m, InPlaceABN) for m in self.model.modules())
        if standard and options.get("norm_layer", "abn") != "abn":
            options["signed_scale"] = True  # the scales of standard BatchNorm may be negative
        model = create_model(self.arch, **options)
        changes = transfer(self.model, model)
        return replace(self, model=model, options=options, changes=changes)


def load_source(what: str, arch: str | None = None, checkpoint: str | None = None) -> Source:
    """The network that `what` names.

    Args:
        what: `model` or `model.tag`; 'hf-hub:ORG/NAME[@COMMIT]'; the folder of a run; a snapshot (.pt); a file of
            weights, legacy or ours. One with a config.json beside it is what that describes.
        arch: the architecture of a file that does not say it.
        checkpoint: a file with the weights of the name that `what` is, instead of the published one.

    Raises:
        UnknownNameError: neither a file nor a name.
        CheckpointError: the weights cannot be had, or the architecture is not known.
    """
    if in_repository(what):
        return _from_timm(what)
    path = Path(what).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".pt":
        try:
            return _from_snapshot(path)
        except CheckpointError:
            if arch is None or not path.is_file():
                raise
    if path.is_file():
        return _from_file(path, arch)
    record = find(what)
    model = create_model(record.name, pretrained=True, checkpoint=checkpoint)
    classes = tuple(labels_of(record, record.num_classes))
    options = {**record.options, "num_classes": record.num_classes}
    return Source(model, record.model, options, record.name, _input_of(model), classes, record)


def _from_folder(folder: Path, file: Path | None = None) -> Source:
    """What a folder's config.json describes, with its weights, or those of a file beside it."""
    if not (folder / "config.json").is_file():
        best = folder / "snapshots" / BEST
        if best.is_file():
            return _from_snapshot(best)
        raise CheckpointError(f"{folder}: is no folder of a run: it has neither config.json nor snapshots/{BEST}")
    return replace(_from_timm(f"local-dir:{folder}", file), text=str(file or folder))


def _from_timm(name: str, file: Path | None = None) -> Source:
    """What timm loads under 'local-dir:…' and 'hf-hub:…', and its config.json says."""
    place = name.partition(":")[2]
    try:
        if name.startswith("hf-hub:"):
            repo, _, revision = place.partition("@")
            path = huggingface_hub.hf_hub_download(repo, "config.json", revision=revision or None)
        else:
            path = f"{place}/config.json"
        config = json.loads(Path(path).read_text())
    except Exception as e:  # the Hub's client lets all kinds through
        raise CheckpointError(f"{name}: has no config.json that can be read: {(str(e).splitlines() or [''])[0]}") from e
    try:
        model = create_model(name, pretrained=True, checkpoint=file)
        options = {**config.get("model_args", {}), "num_classes": config["num_classes"]}
        names = config.get("label_names")
        arch, longest = config["architecture"], int(config.get("longest", SegmentationSection.longest_val))
        ignore = int(config.get("ignore", SegmentationSection.ignore))
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise CheckpointError(f"{name}: config.json does not describe a network of ours ({e})") from e
    classes = tuple(names) if names else None
    return Source(model, arch, options, name, _input_of(model), classes, longest=longest, ignore=ignore)


def _from_snapshot(path: Path) -> Source:
    state = read_snapshot(path)
    recipe = recipe_from(state["recipe"], str(path))
    options = options_of(recipe)
    model = create_model(recipe.model, **options)
    model.load_state_dict(state["ema"] or state["model"])
    scenes = recipe.segmentation
    return Source(
        model, recipe.model, options, str(path), recipe.input, state["classes"], longest=scenes.longest_val,
        ignore=scenes.ignore,
    )  # fmt: skip


def _from_file(path: Path, arch: str | None) -> Source:
    if path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
        beside = _from_folder(path.parent, path)
        if arch in (None, beside.arch):
            return beside
    if path.suffix == ".safetensors" and arch is None:
        with safetensors.safe_open(path, "pt") as file:
            arch = (file.metadata() or {}).get("arch")
    if arch is None or arch not in MODELS:
        raise CheckpointError(f"{path}: of which network are these weights? Pass --arch, such as --arch resnet50_iabn")
    count = count_classes(read_weights(path))
    options: dict[str, Any] = {} if count is None else {"num_classes": count}
    model = create_model(arch, checkpoint=path, **options)
    return Source(model, arch, options, str(path), _input_of(model))


def _input_of(model: nn.Module) -> InputSection:
    """The sizes of the network's published protocol."""
    cfg = timm.data.resolve_model_data_config(model)
    crop = cfg["input_size"][-1]
    scale = round(crop / cfg["crop_pct"])
    return InputSection(scale_val=scale, crop_val=crop, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))
