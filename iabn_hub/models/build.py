"""From an architecture and a request for weights to a network: the one road that all doors take."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from ..checkpoints.catalogue import Checkpoint, Preprocessing, checkpoints_of, records_at_import
from ..checkpoints.errors import CheckpointError
from ..checkpoints.fetch import fetch_checkpoint
from ..checkpoints.fit import fit
from .network import Network

STRIDE = 32  # of every registered architecture at its default options
UNREADABLE = (pickle.UnpicklingError, SafetensorError, EOFError, OSError, RuntimeError, AttributeError, KeyError)


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

    Weights come from the caller if `pretrained_cfg` or its overlay names a file, a Hub repository or a state dict,
    else from the catalogue's record for the tag: fetched, md5-checked, then loaded through timm.

    Raises:
        CheckpointError: no such weights, or they cannot be fetched, verified or loaded.
    """
    cfg = resolve_pretrained_cfg(variant, options.pop("pretrained_cfg", None), options.get("pretrained_cfg_overlay"))
    overlay = dict(options.pop("pretrained_cfg_overlay", None) or {})
    source = cfg.file or cfg.hf_hub_id or "the given weights"
    if pretrained and cfg.file and not Path(cfg.file).exists():
        raise CheckpointError(f"{cfg.file}: there is no such file")
    if pretrained and not (cfg.file or cfg.hf_hub_id or cfg.state_dict or cfg.source):
        record = next((r for r in checkpoints_of(variant) if r.tag == cfg.tag), None)
        if record is None:
            raise CheckpointError(
                f"no weights are published for {variant}: pass pretrained=False, or name a file with "
                "pretrained_cfg_overlay={'file': PATH}. 'iabn-hub list' shows what exists"
            )
        source = overlay["file"] = str(fetch_checkpoint(record, cache=options.get("cache_dir")))
        options = {**record.options, **options}
    if options.get("features_only"):
        options.setdefault("out_indices", tuple(range(network.stages + 1)))
    try:
        return build_model_with_cfg(
            network,
            variant,
            pretrained,
            pretrained_cfg=cfg.to_dict(),
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=functools.partial(fit, new_classifier="num_classes" in options),
            feature_cfg={"feature_cls": "getter"},
            **options,
        )
    except UNREADABLE as e:
        if not pretrained:
            raise
        raise CheckpointError(f"{source}: cannot load {variant} from it: {e or type(e).__name__}") from e
