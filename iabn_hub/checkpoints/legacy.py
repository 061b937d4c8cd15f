"""State dicts in the layout of mapillary/inplace_abn, translated to ours by name alone.

One table serves all families: their legacy names do not clash. Names that are already ours stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .efficientnet_names import is_efficientnet_pytorch, timm_name
from .errors import CheckpointError

T = TypeVar("T")


def _layer(legacy_module: str) -> str:
    """'mod2' is our 'layer1': the stem was counted as the first module."""
    return f"layer{int(legacy_module) - 1}"


def _block(match: re.Match[str]) -> str:
    """mod3.block2.convs.bn1.weight → layer2.1.bn1.weight; projections become the downsample branch."""
    module, number, rest = match.groups()
    projection = {"proj_conv": "downsample.0", "proj_bn": "downsample.1"}
    part, _, name = rest.partition(".")
    if part == "convs":
        return f"{_layer(module)}.{int(number) - 1}.{name}"
    return f"{_layer(module)}.{int(number) - 1}.{projection.get(part, part)}.{name}"


def _dense(match: re.Match[str]) -> str:
    """mod2.convs3.4.bn.weight → layer1.block.4.bn2.weight; convs1 is the 1×1 pair, convs3 the 3×3 one."""
    module, kernel, number, part, name = match.groups()
    return f"{_layer(module)}.block.{number}.{part}{1 if kernel == '1' else 2}.{name}"


_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"mod1\.(.+)"), lambda m: m[1]),
    (re.compile(r"mod(\d)\.block(\d+)\.(.+)"), _block),
    (re.compile(r"mod(\d)\.convs([13])\.(\d+)\.(bn|conv)\.(.+)"), _dense),
    (re.compile(r"tra(\d)\.(bn|conv)\.(.+)"), lambda m: f"layer{m[1]}.transition.{m[2]}.{m[3]}"),
    (re.compile(r"bn_out\.(.+)"), lambda m: f"norm.{m[1]}"),
    (re.compile(r"classifier\.fc\.(.+)"), lambda m: f"fc.{m[1]}"),
)


# Of the segmentation network, whose file holds three state dicts: body, head and cls.
_DENSE_PREDICTION = {
    "head.map_convs.": "head.branches.",
    "head.map_bn.": "head.bn_branches.",
    "head.global_pooling_conv.": "head.pool.",
    "head.global_pooling_bn.": "head.bn_pool.",
    "head.red_conv.": "head.reduce.",
    "head.pool_red_conv.": "head.reduce_pool.",
    "head.red_bn.": "head.bn.",
    "cls.": "fc.",
}


def is_legacy(names: Mapping[str, object]) -> bool:
    """Whether these are names of the legacy layout (all its networks have a `mod1`)."""
    return any(_without_wrappers(name).removeprefix("body.").startswith("mod1.") for name in names)


def _without_wrappers(name: str) -> str:
    """The name without what DataParallel, DistributedDataParallel, AveragedModel and torch.compile put into it."""
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))


def current_name(name: str) -> str:
    """Our name for a legacy parameter or buffer; other names come back unchanged."""
    if name.startswith("body."):
        return "backbone." + current_name(name.removeprefix("body."))
    for old, new in _DENSE_PREDICTION.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    for pattern, translate in _RULES:
        match = pattern.fullmatch(name)
        if match:
            return translate(match)
    return name


def to_current(state_dict: Mapping[str, T]) -> dict[str, T]:
    """The state dict under our names, without the prefixes of wrappers such as DataParallel and torch.compile.

    A state dict in our layout comes back with the same names.

    Raises:
        CheckpointError: two keys would get the same name.
    """
    every = flat(state_dict)
    every.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    bare = _renamed(every, {name: _without_wrappers(name) for name in every})
    if is_efficientnet_pytorch(bare):
        return _renamed(bare, {name: timm_name(name) for name in bare})
    if not is_legacy(bare):  # ours; the first release called the backbone 'body'
        return _renamed(bare, {name: re.sub(r"^body\.", "backbone.", name) for name in bare})
    names = {name: current_name(name) for name in bare}
    # Pre-activation blocks have no norm on their projection, so that branch is the convolution alone.
    if not any(".downsample.1." in name for name in names.values()):
        names = {old: new.replace(".downsample.0.", ".downsample.") for old, new in names.items()}
    return _renamed(bare, names)


def flat(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """One state dict of several, each name behind that of its part."""
    found: dict[str, Any] = {}
    for name, value in state_dict.items():
        if isinstance(value, Mapping):
            found.update((f"{name}.{inner}", each) for inner, each in value.items())
        else:
            found[name] = value
    return found


def _renamed(values: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    renamed: dict[str, T] = {}
    for name, value in values.items():
        if names[name] in renamed:
            raise CheckpointError(f"two of its keys mean {names[name]}; one of them is {name}")
        renamed[names[name]] = value
    return renamed


def to_legacy(state_dict: Mapping[str, T]) -> dict[str, T]:
    """The state dict of one of our networks under the legacy names: what `to_current` undoes.

    Raises:
        CheckpointError: it is not one of our networks.
    """
    if "conv1.weight" not in state_dict and "backbone.conv1.weight" not in state_dict:
        raise CheckpointError("these are not the weights of one of our networks: there is no conv1.weight")
    names = {}
    ours, theirs = ("backbone.", "body.") if "backbone.conv1.weight" in state_dict else ("", "")
    # In pre-activation blocks the first norm stands before the branches, else inside.
    before = any(name.startswith(f"{ours}norm.") for name in state_dict)
    for name in state_dict:
        if name.startswith(ours):
            names[name] = theirs + _legacy_name(name.removeprefix(ours), before)
        else:
            names[name] = _dense_prediction(name)
    return _renamed(state_dict, names)


def _dense_prediction(name: str) -> str:
    for old, new in _DENSE_PREDICTION.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _legacy_name(name: str, before: bool) -> str:
    for pattern, replacement in (
        (r"layer(\d)\.block\.(\d+)\.(bn|conv)1\.(.+)", r"{}.convs1.\2.\3.\4"),
        (r"layer(\d)\.block\.(\d+)\.(bn|conv)2\.(.+)", r"{}.convs3.\2.\3.\4"),
        (r"layer(\d)\.transition\.(.+)", r"tra\1.\2"),
        (r"layer(\d)\.(\d+)\.downsample\.0\.(.+)", r"{}.block{}.proj_conv.\3"),
        (r"layer(\d)\.(\d+)\.downsample\.1\.(.+)", r"{}.block{}.proj_bn.\3"),
        (r"layer(\d)\.(\d+)\.downsample\.(.+)", r"{}.block{}.proj_conv.\3"),
        (r"layer(\d)\.(\d+)\.(bn1\..+)", r"{}.block{}.\3" if before else r"{}.block{}.convs.\3"),
        (r"layer(\d)\.(\d+)\.(.+)", r"{}.block{}.convs.\3"),
        (r"norm\.(.+)", r"bn_out.\1"),
        (r"fc\.(.+)", r"classifier.fc.\1"),
    ):
        match = re.fullmatch(pattern, name)
        if match:
            module = f"mod{int(match[1]) + 1}" if name.startswith("layer") else ""
            block = int(match[2]) + 1 if "block{}" in replacement else 0
            return match.expand(replacement.replace("{}", module, 1).replace("{}", str(block), 1))
    if not re.fullmatch(r"(conv|bn)\d\.\w+", name):  # of the stem
        raise CheckpointError(f"{name}: the earlier package has no such name")
    return f"mod1.{name}"
