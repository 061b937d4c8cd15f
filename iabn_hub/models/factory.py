"""Build networks by name, with weights if requested. Importing this registers the architectures in timm."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import timm
from timm.models import register_notrace_module
from torch import nn

from ..checkpoints.catalogue import records, records_at_import, suggest
from ..checkpoints.errors import CheckpointError, UnknownNameError
from ..checkpoints.weights import BEST, read_snapshot, user_path
from ..layers import ABN, InPlaceABN, InPlaceABNSync
from ..schema import load_json
from ..terminal import printable
from . import efficientnet_lite, iabn_deeplab, iabn_densenet, iabn_resnet, iabn_resnext, iabn_wider_resnet

_logger = logging.getLogger(__name__)
_FAMILIES = (iabn_resnet, iabn_resnext, iabn_wider_resnet, iabn_densenet, efficientnet_lite)
CONVERTED_MODELS = tuple(efficientnet_lite.default_cfgs)  # of timm's layers: without the options of ours
ARCHITECTURES = tuple(name for family in _FAMILIES for name in family.default_cfgs)
SEGMENTATION_MODELS = tuple(iabn_deeplab.default_cfgs)
MODELS = (*ARCHITECTURES, *SEGMENTATION_MODELS)
HUB = "hf-hub:"  # timm's prefix of names on the Hugging Face Hub

for _layer in (ABN, InPlaceABN, InPlaceABNSync):
    register_notrace_module(_layer)

for _record in records_at_import().values():
    if _record.task == "classification" and _record.model not in ARCHITECTURES:
        _logger.warning(
            "%s: %s: there is no architecture %r%s. The record cannot be used.",
            printable(_record.catalogue),
            _record.name,
            _record.model,
            suggest(_record.model, ARCHITECTURES),
        )


def in_repository(name: str) -> bool:
    """Whether a name is one of timm's for a place with a config.json: 'hf-hub:ORG/NAME', 'local-dir:PATH'."""
    return name.startswith((HUB, "local-dir:"))


def is_run(name: str) -> bool:
    """Whether this is the path of a folder, or of a snapshot, and not a name."""
    if ":" in name:
        return False
    path = user_path(name)
    if path.is_dir():  # a folder such as 'resnet50_iabn.birds' does not hide a checkpoint of that name
        return "/" in name or name.partition(".")[0] not in MODELS
    return path.suffix == ".pt" and path.is_file()


def _of_run(place: Path, checkpoint: Any, options: dict[str, Any]) -> nn.Module:
    if place.is_dir() and (place / "config.json").is_file():
        return create_model(f"local-dir:{place}", pretrained=True, checkpoint=checkpoint, **options)
    snapshot = best_snapshot(place) if place.is_dir() else place
    config = snapshot_config(snapshot, read_snapshot(snapshot))
    options = {**config.get("model_args", {}), "num_classes": config.get("num_classes"), **options}
    overlay = {**config.get("pretrained_cfg", {}), **options.pop("pretrained_cfg_overlay", {})}
    return create_model(
        config["architecture"], checkpoint=checkpoint or snapshot, pretrained_cfg_overlay=overlay, **options
    )


def best_snapshot(run: Path) -> Path:
    """The snapshot of the best epoch in the folder of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = run / "snapshots" / BEST
    if not path.is_file():
        raise CheckpointError(f"{run}: is not the folder of a run: it has neither config.json nor snapshots/{BEST}")
    return path


def snapshot_config(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the network of a snapshot, as config.json has it.

    Args:
        path: of the snapshot.
        state: what `read_snapshot` gave.

    Raises:
        CheckpointError: it is not known, or of another package's network.
    """
    config = state.get("config")
    beside = path.parent.parent / "config.json"  # of the run, which the first version did not store in its snapshots
    if config is None and beside.is_file():
        config = load_json(beside, CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: was written by an earlier version, which did not store the configuration of the network, and "
            f"there is no {beside}: train on with --resume auto, which writes new snapshots"
        )
    architecture = config.get("architecture")
    if architecture not in MODELS:
        raise CheckpointError(
            f"{path}: config.json does not describe a network of this package ({architecture!r} is not a network of "
            "this package)"
        )
    return config


def list_models(pretrained: bool = False) -> list[str]:
    """Names for `create_model`: all architectures, or every `model.tag` with weights.

    Example:
        >>> import iabn_hub
        >>> "resnet50_iabn" in iabn_hub.list_models()
        True
        >>> "resnet50_iabn.sync_lr_512_in1k" in iabn_hub.list_models(pretrained=True)
        True
    """
    if not pretrained:
        return sorted(MODELS)
    return [name for name, record in records().items() if record.model in MODELS]


def create_model(
    name: str, pretrained: bool = False, checkpoint: str | os.PathLike[str] | None = None, **options: Any
) -> nn.Module:
    """`timm.create_model` for our names, with nearest names for a mistyped one.

    Args:
        name: `model`, `model.tag`, or 'hf-hub:ORG/NAME' and 'local-dir:PATH' as timm takes them; or the folder or a
            snapshot (.pt) of a training run, whose weights are loaded.
        pretrained: load the weights of the tag (without one: of the model's first checkpoint).
        checkpoint: load this file instead, legacy `.pth.tar` or safetensors, or the one in this folder; nothing is
            fetched. Or 'hf-hub:ORG/NAME[@COMMIT]', the weights of a repository.
        options: `num_classes`, `in_chans`, `features_only`, and the options of the architecture.

    Raises:
        UnknownNameError: no such model or tag.
        CheckpointError: the weights cannot be fetched, verified or loaded.

    Example:
        >>> import torch, iabn_hub
        >>> model = iabn_hub.create_model("test_resnet_iabn.mnist", pretrained=True)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    if is_run(name):
        return _of_run(user_path(name), checkpoint, options)
    # Names without a tag are known without reading the catalogues, which may be the caller's and wrong.
    if ":" not in name and name not in MODELS and name not in list_models(pretrained=True):
        raise UnknownNameError(f"no model is called {name!r}" + suggest(name, [*MODELS, *list_models(pretrained=True)]))
    if isinstance(checkpoint, str) and checkpoint.startswith(HUB):
        pretrained = True
        from_hub = {"hf_hub_id": checkpoint.removeprefix(HUB), "file": None, "url": None}
        options["pretrained_cfg_overlay"] = {**options.get("pretrained_cfg_overlay", {}), **from_hub}
    elif checkpoint is not None:  # an empty name as well: it is refused, not replaced by the published weights
        pretrained = True
        options["pretrained_cfg_overlay"] = {**options.get("pretrained_cfg_overlay", {}), "file": os.fspath(checkpoint)}
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    return model
