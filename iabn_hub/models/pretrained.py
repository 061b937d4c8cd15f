"""Load a network with its weights from whatever names it: the catalogue, a run, a snapshot, a file, the Hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import timm.data
from torch import nn

from ..checkpoints.catalogue import Checkpoint, checkpoints_of, find
from ..checkpoints.errors import CheckpointError, UnknownNameError
from ..checkpoints.weights import read_snapshot, read_weights, user_path
from ..layers import ABN, InPlaceABN
from ..schema import load_json
from .factory import (
    HUB,
    MODELS,
    SEGMENTATION_MODELS,
    best_snapshot,
    create_model,
    in_repository,
    is_run,
    snapshot_config,
)
from .state_dict import count_classes
from .timm_config import EvalConfig
from .transfer import transfer

# Keys of config.json, those of the first version included, and what they are in `EvalConfig`.
SIZES = {"longest": "long_side", "ignore": "ignore_index", "long_side": "long_side", "ignore_index": "ignore_index"}


@dataclass(frozen=True)
class Pretrained:
    """A network with its weights.

    Args:
        model: in training mode, on the CPU.
        arch, options: create another network like it.
        name: what it was loaded from, for messages.
        evaluation: how images are prepared for it.
        classes: their names, where known.
        record: of the catalogue, if it is published.
        changes: what it computes differently from the network that was named; see `rebuilt`.
    """

    model: nn.Module
    arch: str
    options: dict[str, Any]
    name: str
    evaluation: EvalConfig
    classes: tuple[str, ...] | None = None
    record: Checkpoint | None = None
    changes: list[str] = field(default_factory=list)

    @property
    def task(self) -> str:
        """'classification' or 'segmentation'."""
        return "segmentation" if self.arch in SEGMENTATION_MODELS else "classification"

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for every class; 'class 7' where it has none."""
        return self.classes or tuple(f"class {i}" for i in range(self.options["num_classes"]))

    def rebuilt(self, **options: Any) -> Pretrained:
        """The same weights in a network created with other options; `changes` says what differs."""
        options = {**self.options, **options}
        standard = any(isinstance(m, ABN) and not isinstance(m, InPlaceABN) for m in self.model.modules())
        if standard and options.get("norm_layer", "abn") != "abn":
            options["signed_scale"] = True  # the scales of standard BatchNorm may be negative
        model = create_model(self.arch, **options)
        changes = transfer(self.model, model)
        return replace(self, model=model, options=options, changes=changes)


def load_pretrained(
    name: str, arch: str | None = None, checkpoint: str | None = None, task: str | None = None
) -> Pretrained:
    """The network that `name` stands for, with its weights.

    Args:
        name: `model` or `model.tag`; 'hf-hub:ORG/NAME[@COMMIT]' or 'local-dir:PATH'; the folder of a run; a snapshot
            (.pt); a file of weights, legacy or ours. A file with a config.json beside it is what that describes.
        arch: the architecture of a file that does not state it.
        checkpoint: a file, or 'hf-hub:…', with the weights for the model `name`, instead of the published ones.
        task: 'classification' or 'segmentation', refuses networks for the other; nothing is downloaded then.

    Raises:
        UnknownNameError: neither a file nor a name, or a network for another task.
        CheckpointError: the weights cannot be read, or the architecture is not known.

    Example:
        >>> from iabn_hub.models.pretrained import load_pretrained
        >>> network = load_pretrained("test_resnet_iabn.mnist")
        >>> network.task, network.arch, network.labels[:3]
        ('classification', 'test_resnet_iabn', ('0', '1', '2'))
    """
    if task is not None and name.partition(".")[0] in MODELS:
        _check_task(name, name.partition(".")[0], task)
    network = _load(name, arch, checkpoint)
    if task is not None:
        _check_task(network.name, network.arch, task)
    return network


def _check_task(name: str, arch: str, task: str) -> None:
    found = "segmentation" if arch in SEGMENTATION_MODELS else "classification"
    if found != task:
        raise UnknownNameError(f"{name} is for {found}, not for {task}")


def _load(name: str, arch: str | None, checkpoint: str | None) -> Pretrained:
    if checkpoint is not None and name in MODELS and not checkpoint.startswith(HUB):
        return _from_file(user_path(checkpoint), name)
    if in_repository(name):
        return _from_timm(name)
    path = user_path(name)
    if path.is_dir() and is_run(name):
        return _from_folder(path)
    if path.suffix == ".pt":
        try:
            return _from_snapshot(path)
        except CheckpointError:
            if arch is None or not path.is_file():
                raise
    if path.is_file():
        return _from_file(path, arch)
    record = find_checkpoint(name)
    model = create_model(record.name, pretrained=True, checkpoint=checkpoint)
    options = {**record.options, "num_classes": record.num_classes}
    return Pretrained(model, record.model, options, record.name, _eval_config(model), class_names(record), record)


def find_checkpoint(name: str) -> Checkpoint:
    """The record of this name.

    Raises:
        UnknownNameError: there is none; says so where the architecture exists and only its weights do not.
    """
    if name in MODELS and not checkpoints_of(name):
        raise UnknownNameError(f"no weights are published for {name}; 'iabn-hub list' shows what exists")
    return find(name)


def class_names(record: Checkpoint) -> tuple[str, ...] | None:
    """The class names of a checkpoint in the order of its logits, where they are known."""
    if record.classes is None and record.dataset == "imagenet-1k" and record.num_classes == 1000:
        imagenet = timm.data.ImageNetInfo("imagenet-1k")
        return tuple(imagenet.index_to_description(i) for i in range(1000))
    return record.classes


def _from_folder(folder: Path, file: Path | None = None) -> Pretrained:
    """What a folder's config.json describes, with its weights, or those of a file beside it."""
    if not (folder / "config.json").is_file():
        return _from_snapshot(best_snapshot(folder))
    return replace(_from_timm(f"local-dir:{folder}", file), name=str(file or folder))


def _from_timm(name: str, file: Path | None = None) -> Pretrained:
    """What timm loads under 'local-dir:…' and 'hf-hub:…', described by its config.json."""
    place = name.partition(":")[2]
    if name.startswith(HUB) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", place, re.ASCII):
        raise CheckpointError(f"{name}: is not of the form {HUB}ORG/NAME or {HUB}ORG/NAME@COMMIT")
    try:
        if name.startswith(HUB):
            repo, _, revision = place.partition("@")
            path = huggingface_hub.hf_hub_download(repo, "config.json", revision=revision or None)
        else:
            path = f"{place}/config.json"
        config = load_json(Path(path), CheckpointError)
    except CheckpointError:
        raise
    except Exception as e:  # the Hub's client raises errors of many kinds
        raise CheckpointError(f"{name}: has no config.json that can be read: {(str(e).splitlines() or [''])[0]}") from e
    with _described_by(name):
        model = create_model(name, pretrained=True, checkpoint=file)
    return _described(name, config, model)


@contextlib.contextmanager
def _described_by(name: str) -> Iterator[None]:
    """Turn what goes wrong with a configuration that describes no network into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise CheckpointError(f"{name}: config.json does not describe a network of this package ({e})") from e


def _described(name: str, config: Mapping[str, Any], model: nn.Module) -> Pretrained:
    """A network with what its configuration says of it."""
    with _described_by(name):
        options = {**config.get("model_args", {}), "num_classes": config["num_classes"]}
        names = config.get("label_names")
        classes = tuple(str(each) for each in names) if names else None
        sizes: dict[str, Any] = {field: int(config[key]) for key, field in SIZES.items() if key in config}
        evaluation = replace(_eval_config(model), **sizes)
        return Pretrained(model, str(config["architecture"]), options, name, evaluation, classes)


def _from_snapshot(path: Path) -> Pretrained:
    state = read_snapshot(path)
    config = snapshot_config(path, state)
    with _described_by(str(path)):
        options = {**config.get("model_args", {}), "num_classes": config.get("num_classes")}
        overlay = config.get("pretrained_cfg")
        model = create_model(config["architecture"], pretrained_cfg_overlay=overlay, **options)
        model.load_state_dict(state["ema"] or state["model"])
    return _described(str(path), config, model)


def _from_file(path: Path, arch: str | None) -> Pretrained:
    if path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
        beside = _from_folder(path.parent, path)
        if arch in (None, beside.arch):
            return beside
    if path.suffix == ".safetensors" and arch is None:
        try:
            with safetensors.safe_open(path, "pt") as file:
                arch = (file.metadata() or {}).get("arch")
        except (OSError, safetensors.SafetensorError) as e:
            raise CheckpointError(f"{path}: is not a file of weights, or is damaged ({type(e).__name__})") from e
    if arch is None or arch not in MODELS:
        raise CheckpointError(f"{path}: does not state its architecture: pass --arch, such as --arch resnet50_iabn")
    count = count_classes(read_weights(path))
    given: dict[str, Any] = {} if count is None else {"num_classes": count}
    model: Any = create_model(arch, checkpoint=path, **given)
    options = {"num_classes": model.num_classes}
    return Pretrained(model, arch, options, str(path), _eval_config(model))


def _eval_config(model: nn.Module) -> EvalConfig:
    """The sizes of the network's published protocol."""
    cfg = timm.data.resolve_model_data_config(model)
    crop = cfg["input_size"][-1]
    return EvalConfig(round(crop / cfg["crop_pct"]), crop, tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"])
