"""Weights from one network to another of the same architecture, whose norms or activations may differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoints.errors import CheckpointError
from ..layers import ABN, InPlaceABN
from ..layers.reference import effective_scale
from .state_dict import CLASSIFIERS, count_classes


def transfer(source: nn.Module, target: nn.Module) -> list[str]:
    """Load the weights of `source` into `target`; scales keep what they do, whatever each network makes of them.

    A classifier for another number of classes stays as it is in `target`.

    Returns:
        One sentence for everything that the target computes differently.

    Raises:
        CheckpointError: the architectures differ, or the target's norms cannot have a negative scale.
    """
    state = source.state_dict()
    expected = target.state_dict()
    sentences = []
    differ = [n for n in state.keys() | expected.keys() if _shape(state.get(n)) != _shape(expected.get(n))]
    if differ and all(name.startswith(CLASSIFIERS) for name in differ):
        sentences.append(
            f"the classifier is new: the weights have {count_classes(state) or 0} classes, the network "
            f"{count_classes(expected) or 0}"
        )
        state = {n: v for n, v in state.items() if not n.startswith(CLASSIFIERS)}
        state |= {n: v for n, v in expected.items() if n.startswith(CLASSIFIERS)}
    elif differ:
        raise CheckpointError(f"these are weights of another architecture: {', '.join(sorted(differ)[:5])} differ")
    theirs = {name: layer for name, layer in source.named_modules() if isinstance(layer, ABN)}
    ours = {name: layer for name, layer in target.named_modules() if isinstance(layer, ABN)}
    for name, layer in ours.items():
        if layer.weight is not None:
            state[f"{name}.weight"] = _weight(name, layer, _scale(theirs[name]))
    target.load_state_dict(state)
    changed = {(_normalisation(theirs[n]), _normalisation(ours[n])) for n in ours}
    sentences += [f"normalisation: {a} becomes {b}, with the same scales" for a, b in sorted(changed) if a != b]
    activations = [(_activation(theirs[n]), _activation(ours[n])) for n in ours]
    for a, b in sorted({pair for pair in activations if pair[0] != pair[1]}):
        count = activations.count((a, b))
        sentences.append(f"activation: {a} becomes {b} in {count} layers, so the figures will be others")
    return sentences


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _scale(layer: ABN) -> Tensor:
    """γ of a layer, in float64."""
    weight = layer.weight.detach().double() if layer.weight is not None else torch.ones(layer.num_features).double()
    return effective_scale(weight, layer.eps, layer.signed_scale) if isinstance(layer, InPlaceABN) else weight


def _weight(name: str, layer: ABN, scale: Tensor) -> Tensor:
    """The weight from which `layer` makes this scale."""
    if not isinstance(layer, InPlaceABN) or layer.signed_scale:
        return scale
    negative = int((scale < 0).sum())
    if negative:
        raise CheckpointError(
            f"{name} has {negative} negative scales, which |w| + eps cannot be: build the network with "
            "signed_scale=True (in a recipe: --set training.signed_scale=true)"
        )
    return (scale - layer.eps).clamp(min=0)


def _normalisation(layer: ABN) -> str:
    if not isinstance(layer, InPlaceABN):
        return "standard BatchNorm"
    return "in-place ABN with signed scale" if layer.signed_scale else "in-place ABN"


def _activation(layer: ABN) -> str:
    parameter = f"({layer.activation_param:g})" if layer.activation in ("leaky_relu", "elu") else ""
    return layer.activation + parameter
