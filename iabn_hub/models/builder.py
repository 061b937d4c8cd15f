"""Build a network, with weights if requested. Every registered architecture calls `build`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from ..checkpoints.catalogue import Checkpoint, checkpoints_of
from ..checkpoints.errors import CheckpointError
from ..checkpoints.fetch import fetch_checkpoint
from ..checkpoints.legacy import is_legacy, to_current
from ..checkpoints.weights import WEIGHTS as HF_WEIGHTS
from ..checkpoints.weights import read_weights, weights_in
from .state_dict import fit
from .timm_config import URL_SCHEME


def build(network: Any, variant: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """The network, with verified weights if `pretrained`.

    Weights come from the caller if `pretrained_cfg` or its overlay names a file, a folder, a Hub repository or a state
    dict, else from the catalogue's record for the tag, verified by md5. They are read before the network is built, and
    only here: timm never opens a file.

    Raises:
        CheckpointError: no such weights, or they cannot be fetched, verified or loaded.
    """
    cfg = resolve_pretrained_cfg(
        variant, options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None)
    )
    new_classifier = "num_classes" in options
    source, weights, unsigned = "", None, None
    if pretrained:
        record = next((r for r in checkpoints_of(variant) if r.tag == cfg.tag), None)
        if record:
            _check_options(record, network)
            unsigned = _reads_unsigned(variant, record.options)
            options = {**record.options, **options}
        source, weights, is_published = _read(cfg, variant, record, options.get("cache_dir"))
        unsigned = unsigned if is_published else None
    if options.get("features_only"):
        options.setdefault("out_indices", tuple(range(network.stages + 1)))

    def make(**arguments: Any) -> nn.Module:
        model = network(**arguments)
        model.register_load_state_dict_pre_hook(_translate_legacy)
        if weights is not None:
            try:
                model.load_state_dict(fit(weights, model, new_classifier, unsigned))
            except CheckpointError as e:
                raise type(e)(f"{source}: cannot load {variant}: {e}") from e
        return model

    model: nn.Module = build_model_with_cfg(
        make, variant, False, pretrained_cfg=cfg.to_dict(), feature_cfg={"feature_cls": "getter"}, **options
    )
    return model


def _read(
    cfg: PretrainedCfg, variant: str, record: Checkpoint | None, cache: str | None
) -> tuple[str, Mapping[str, Any], bool]:
    """Where the weights come from, in words; the weights; and whether they are the published ones."""
    if cfg.state_dict:
        return "the given state dict", cfg.state_dict, False
    if cfg.file is not None:
        if not str(cfg.file):
            raise CheckpointError("the name of the file of weights is empty")
        path = Path(cfg.file).expanduser()
        path = weights_in(path) if path.is_dir() else path
        return str(path), read_weights(path), False
    if cfg.hf_hub_id:
        source = f"hf-hub:{cfg.hf_hub_id}"
        return source, read_weights(_from_hub(source, cfg.hf_hub_id, cfg.hf_hub_filename, cache)), False
    if cfg.url and not str(cfg.url).startswith(URL_SCHEME):
        raise CheckpointError(f"{cfg.url}: weights are not loaded from a bare URL; download the file and name it")
    if record is None:
        raise CheckpointError(
            f"no weights are published for {variant}: pass pretrained=False, or name a file with "
            "pretrained_cfg_overlay={'file': PATH}. 'iabn-hub list' shows what exists"
        )
    path = fetch_checkpoint(record, cache=cache)
    return str(path), read_weights(path), True


def _from_hub(source: str, place: str, filename: str | None, cache: str | None) -> Path:
    """The file of weights of a repository of the Hub, named as timm names them."""
    repo, _, revision = place.partition("@")
    names = [filename] if filename else [HF_WEIGHTS, "pytorch_model.bin"]
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision or None, cache_dir=cache))
        except Exception as e:  # whatever the Hub's client lets through
            if name == names[-1] or not isinstance(e, EntryNotFoundError):
                raise CheckpointError(f"{source}: {str(e).strip() or type(e).__name__}") from e
    raise AssertionError("the last name is returned or raises")


def _translate_legacy(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a state dict in the legacy layout today's names before it is loaded (timm's `checkpoint_path` does that)."""
    if not prefix and is_legacy(state_dict):
        current = to_current(state_dict)
        state_dict.clear()
        state_dict.update(current)


def _reads_unsigned(variant: str, options: Mapping[str, Any]) -> bool:
    standard = "abn" if variant.endswith("_abn") else "iabn"
    return options.get("norm_layer", standard) != "abn" and not options.get("signed_scale", False)


def _check_options(record: Checkpoint, network: Any) -> None:
    unknown = [name for name in record.options if name not in inspect.signature(network).parameters]
    if unknown:
        raise CheckpointError(
            f"{record.catalogue}: {record.name}: {network.__name__} has no option {', '.join(unknown)}"
        )
