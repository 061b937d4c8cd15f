"""Names of parameters in the package efficientnet_pytorch, translated into timm's, for EfficientNet-Lite0."""

from __future__ import annotations

import re
from collections.abc import Iterable

DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
# A block without expansion, which is the first, has one convolution and one norm less.
LAYERS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
FIRST_LAYERS = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def is_efficientnet_pytorch(names: Iterable[str]) -> bool:
    """Whether these are names of that package."""
    return "_conv_stem.weight" in names


def timm_name(name: str) -> str:
    """timm's name for a parameter or buffer; other names come back unchanged."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if not block:
        layer, _, rest = name.partition(".")
        return f"{AROUND[layer]}.{rest}" if layer in AROUND else name
    number, layer, rest = int(block[1]), block[2], block[3]
    layers = FIRST_LAYERS if number == 0 else LAYERS
    for stage, depth in enumerate(DEPTHS):
        if number < depth and layer in layers:
            return f"blocks.{stage}.{number}.{layers[layer]}.{rest}"
        number -= depth
    return name
