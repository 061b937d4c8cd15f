"""timm's description of a network and its weights: the registry's default configurations, and config.json."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs
from timm.models._hub import save_config_for_hf
from torch import nn

from ..checkpoints.catalogue import Checkpoint, Preprocessing, records_at_import

URL_SCHEME = "iabn-hub:"  # how timm is told that weights exist
STRIDE = 32  # of every registered architecture at its default options


def default_cfgs_of(*models: str, first_conv: str = "conv1", classifier: str = "fc") -> Any:
    """timm's `default_cfgs` for these architectures, made from the catalogue."""
    cfgs: dict[str, Any] = {}
    known = records_at_import().values()
    for model in models:
        cfgs |= {r.name: _cfg(r) for r in known if r.model == model} or {model: _cfg(None)}
    for cfg in cfgs.values():
        cfg |= {"first_conv": first_conv, "classifier": classifier}
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
    }
    if record:
        cfg |= {
            "url": URL_SCHEME + record.name,  # `builder.build` turns the name into a verified file
            "license": record.license or None,
            "description": record.description or None,
            "label_names": record.classes,
            "origin_url": record.source_url or None,
        }
    return cfg


@dataclass(frozen=True)
class EvalConfig:
    """How images are prepared for validation; sizes in pixels.

    Args:
        resize: shorter side before the crop; −1 does not resize. For classification.
        crop: side of the centre crop; of a segmentation network, the side of its training crops.
        mean, std: of the RGB channels, in 0..1.
        interpolation: of the resize.
        long_side: longer side that a segmentation network is shown; 0 does not resize.
        ignore_index: value in its label files that is not scored.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    long_side: int = 2048
    ignore_index: int = 255


def timm_config(
    model: nn.Module,
    options: dict[str, Any],
    evaluation: EvalConfig,
    classes: Sequence[str] | None = None,
    segmentation: bool = False,
    **pretrained_cfg: Any,
) -> dict[str, Any]:
    """config.json of a network, by which timm's 'local-dir:' and 'hf-hub:' build it again.

    Args:
        options: what the network was created with.
        classes: their names, where known.
        segmentation: also store what only segmentation networks have.
        pretrained_cfg: further entries of timm's `pretrained_cfg`, such as `tag` and `license`.
    """
    options = {name: value for name, value in options.items() if name != "num_classes"}
    if options.get("norm_layer") == "iabn_sync":
        options["norm_layer"] = "iabn"  # equal once it is trained, and needs no process group
    crop = evaluation.crop
    resize = crop if segmentation or evaluation.resize <= 0 else evaluation.resize
    cfg = {
        "input_size": [3, crop, crop], "crop_pct": crop / max(resize, crop),
        "interpolation": evaluation.interpolation, "mean": list(evaluation.mean), "std": list(evaluation.std),
    }  # fmt: skip
    config: dict[str, Any] = {"model_args": options, "pretrained_cfg": cfg | pretrained_cfg}
    if segmentation:
        config |= {"long_side": evaluation.long_side, "ignore_index": evaluation.ignore_index}
    if classes:
        config["label_names"] = list(classes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(model, str(path), config)
        content: dict[str, Any] = json.loads(path.read_text())
    # With it, timm would replace a classifier of another size where it should refuse it.
    content["model_args"].pop("num_classes", None)
    return content


def config_text(config: dict[str, Any]) -> bytes:
    """The bytes of config.json; equal configurations give equal bytes."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
