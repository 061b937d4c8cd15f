"""Whether a state dict is the one a network needs: every key that is missing, extra or misshapen, by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..checkpoints.errors import CheckpointError
from ..checkpoints.legacy import is_legacy, to_current
from ..layers import ABN, InPlaceABN

_logger = logging.getLogger(__name__)
SHOWN = 5  # names listed of each kind before '… and N more'
FIRST_CONVS = ("conv1.weight", "backbone.conv1.weight", "conv_stem.weight")
CLASSIFIERS = ("fc.", "classifier.")
RGB = 3


def fit(
    state_dict: Mapping[str, Any], model: nn.Module, new_classifier: bool = False, unsigned: bool | None = None
) -> dict[str, Tensor]:
    """A state dict that `model` loads strictly, from one in the legacy layout or ours.

    Only two things are adapted: filters for RGB to another number of input channels, as timm does it, and a classifier
    for another number of classes, which stays randomly initialised. All else must be there, with its shape.

    Args:
        new_classifier: the caller asked for a number of classes, so the weights may have another one.
        unsigned: the weights were trained with the scale |w| + eps (False: with w itself; None: unknown).

    Raises:
        CheckpointError: keys are missing, extra, misshapen or not plain tensors, or the network reads the scales
            differently; the message lists them.
    """
    given = to_current(state_dict)
    expected = model.state_dict()
    if new_classifier:
        _keep_classifier_if_new(given, expected)
    _adapt_first_conv(given, expected)

    # Files older than torch 0.4.1 do not count batches; the layer starts that count at 0.
    missing = [n for n in expected if n not in given and not n.endswith(".num_batches_tracked")]
    extra = [n for n in given if n not in expected]
    shared = [n for n in expected if n in given]
    strange = [f"{n} is {_describe(given[n])}" for n in shared if not _is_plain(given[n], expected[n])]
    misshapen = [
        f"{n} is {tuple(given[n].shape)}, expected {tuple(expected[n].shape)}"
        for n in shared
        if isinstance(given[n], Tensor) and given[n].shape != expected[n].shape
    ]
    kinds = {"missing": missing, "not expected": extra, "misshapen": misshapen, "not plain tensors": strange}
    problems = [f"{kind}: {_list(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            "these weights do not belong to this network: " + "; ".join(problems) + _stem(given, expected)
        )
    broken = [n for n in shared if given[n].is_floating_point() and not torch.isfinite(given[n]).all()]
    if broken:
        _logger.warning("the weights have values that are NaN or infinite: %s", _list(broken))
    if unsigned is not None:
        _check_scales(given, model, unsigned)
    elif not is_legacy(state_dict):
        _warn_of_negative_scales(given, model)
    return given


def _stem(given: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    """The way out where it is the stem that does not fit."""
    name = next(name for name in FIRST_CONVS if name in expected)
    if not isinstance(given.get(name), Tensor) or given[name].dim() != 4:
        return ""
    sizes = (given[name].shape[-1], expected[name].shape[-1])
    if sizes == (7, 3):
        return ". They have a 7×7 convolution first: create the network with input_3x3=False"
    if sizes == (3, 7) and name.replace("conv1", "conv3") in given:
        return ". They have three 3×3 convolutions first: create the network with input_3x3=True, if it has that option"
    return ""


def count_classes(state_dict: Mapping[str, Any]) -> int | None:
    """How many classes these weights tell apart, in the legacy layout or ours; None if they have no classifier."""
    current = to_current(state_dict)
    weight = next((current[f"{name}weight"] for name in CLASSIFIERS if f"{name}weight" in current), None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() > 0 else None


def _keep_classifier_if_new(given: dict[str, Any], expected: Mapping[str, Tensor]) -> None:
    classes, ours = count_classes(given), count_classes(expected)
    if classes is None or classes == ours:
        return
    for name in [n for n in given if n.startswith(CLASSIFIERS)]:
        del given[name]
    given.update((n, value) for n, value in expected.items() if n.startswith(CLASSIFIERS))
    if ours is not None:
        _logger.warning("the classifier is new: the weights have %d classes, the network %d", classes, ours)


def _adapt_first_conv(given: dict[str, Any], expected: Mapping[str, Tensor]) -> None:
    name = next(name for name in FIRST_CONVS if name in expected)
    theirs, channels = given.get(name), expected[name].shape[1]
    if isinstance(theirs, Tensor) and theirs.dim() == 4 and theirs.shape[1] == RGB != channels:
        given[name] = adapt_input_conv(channels, theirs)


def _is_plain(value: Any, expected: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point() == expected.is_floating_point()
    )


def _describe(value: Any) -> str:
    return f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_scales(given: Mapping[str, Tensor], model: nn.Module, unsigned: bool) -> None:
    """Refuse negative scales that were trained as |w| + eps and would be read as w, or the other way round."""
    for name, layer in model.named_modules():
        if isinstance(layer, ABN) and layer.weight is not None:
            reads_unsigned = isinstance(layer, InPlaceABN) and not layer.signed_scale
            if reads_unsigned != unsigned and bool((given[f"{name}.weight"] < 0).any()):
                trained, reads = ("|w| + eps", "w") if unsigned else ("w", "|w| + eps")
                raise CheckpointError(
                    f"these weights were trained with the scale {trained}, and {name} would read its negative scales "
                    f"as {reads}: leave norm_layer and signed_scale as the checkpoint has them"
                )


def _warn_of_negative_scales(given: Mapping[str, Tensor], model: nn.Module) -> None:
    """Weights of unknown origin may be those of a standard BatchNorm, which the default scale would read otherwise."""
    layers = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, InPlaceABN) and not layer.signed_scale and f"{name}.weight" in given
        if bool((given[f"{name}.weight"] < 0).any())
    ]
    if layers:
        _logger.warning(
            "%d layers have negative scales, which the network reads as |w| + eps (%s): if the weights come from a "
            "network with standard BatchNorm, create it with signed_scale=True",
            len(layers),
            _list(layers),
        )


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
