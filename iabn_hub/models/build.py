"""From an architecture and a request for weights to a network: the one road that all doors take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, load_state_dict_from_hf
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from ..checkpoints.catalogue import Checkpoint, Preprocessing, checkpoints_of, records_at_import
from ..checkpoints.errors import CheckpointError
from ..checkpoints.fetch import fetch_checkpoint
from ..checkpoints.fit import fit
from ..checkpoints.weights import read_weights, weights_in
from .network import Network

STRIDE = 32  # of every registered architecture at its default options


def default_cfgs_of(*models: str) -> Any:
    """timm's `default_cfgs` for these architectures, made from the catalogue."""
    cfgs: dict[str, Any] = {}
    known = records_at_import().values()
    for model in models:
        cfgs |= {r.name: _cfg(r) for r in known if r.model == model} or {model: _cfg(None)}
    return generate_default_cfgs(cfgs)


def _cfg(record: Checkpoint | None) -> dict[str, Any]:
    images = record.input if record else Preprocessing()
    cfg: dict[str, Any] = {
        "num_classes": record.num_classes if record else 1000,
        "input_size": images.size,
        "pool_size": tuple(side // STRIDE for side in images.size[1:]),
        "crop_pct": images.crop_pct,
        "interpolation": images.interpolation,
        "mean": images.mean,
        "std": images.std,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    if record:
        cfg |= {
            "url": f"iabn-hub:{record.name}",  # `build` turns the name into a verified file
            "license": record.license or None,
            "description": record.description or None,
            "label_names": record.classes,
            "origin_url": f"https://drive.google.com/file/d/{record.google_drive_id}"
            if record.google_drive_id
            else None,
        }
    return cfg


def build(network: type[Network], variant: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """The network, with verified weights if `pretrained`.

    Weights come from the caller if `pretrained_cfg` or its overlay names a file, a folder, a Hub repository or a state
    dict, else from the catalogue's record for the tag, md5-checked.

    Raises:
        CheckpointError: no such weights, or they cannot be fetched, verified or loaded.
    """
    cfg = resolve_pretrained_cfg(
        variant, options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None)
    )
    overlay: dict[str, Any] = {}
    source, read = "", None
    if pretrained:
        source, read, needed = _source(cfg, variant, options.get("cache_dir"))
        options = {**needed, **options}
        # Given a state dict, timm hands it to our filter and loads nothing itself: files are read in one place.
        overlay = {"state_dict": {"source": source}, "source": None}
    if options.get("features_only"):
        options.setdefault("out_indices", tuple(range(network.stages + 1)))
    new_classifier = "num_classes" in options
    try:
        model: Any = build_model_with_cfg(
            network,
            variant,
            pretrained,
            pretrained_cfg=cfg.to_dict(),
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=lambda _, model: fit(read(), model, new_classifier) if read else {},
            feature_cfg={"feature_cls": "getter"},
            **options,
        )
    except CheckpointError as e:
        raise type(e)(f"{source}: {e}" if source not in str(e) else str(e)) from e
    for holder in (model, getattr(model, "model", model)):  # a feature extractor has the network inside
        holder.pretrained_cfg.pop("state_dict", None)
        if cfg.source:
            holder.pretrained_cfg["source"] = cfg.source
    built: nn.Module = model
    return built


def _source(
    cfg: PretrainedCfg, variant: str, cache: str | None
) -> tuple[str, Callable[[], Mapping[str, Any]], Mapping[str, Any]]:
    """Where the weights come from, in words; how to read them; and the options that the network needs for them."""
    repository = cfg.hf_hub_id
    if repository and (cfg.source == "hf-hub" or not (cfg.state_dict or cfg.file)):
        name = {"filename": cfg.hf_hub_filename} if cfg.hf_hub_filename else {}
        return (
            f"hf-hub:{repository}",
            lambda: load_state_dict_from_hf(repository, **name, weights_only=True, cache_dir=cache),
            {},
        )
    if cfg.state_dict:
        return "the given state dict", lambda: cfg.state_dict, {}
    if cfg.file:
        path = Path(cfg.file).expanduser()
        path = weights_in(path) if path.is_dir() else path
        return str(path), lambda: read_weights(path), {}
    record = next((r for r in checkpoints_of(variant) if r.tag == cfg.tag), None)
    if record is None:
        raise CheckpointError(
            f"no weights are published for {variant}: pass pretrained=False, or name a file with "
            "pretrained_cfg_overlay={'file': PATH}. 'iabn-hub list' shows what exists"
        )
    verified = fetch_checkpoint(record, cache=cache)
    return str(verified), lambda: read_weights(verified), record.options
