"""The network of a recipe, with the initialisation that the recipe names."""

from __future__ import annotations

from torch import nn

from ..layers import ABN
from ..models import create_model
from ..recipes import Recipe

CLASSIFIER_GAIN = 0.1


def build_network(recipe: Recipe) -> nn.Module:
    """The network of a recipe, randomly initialised as the recipe says."""
    model = create_model(recipe.model, **recipe.model_options())
    _initialize(model, recipe)
    return model


def _initialize(model: nn.Module, recipe: Recipe) -> None:
    """Convolutions by `weight_init`; classifier xavier-uniform with gain 0.1; scales 1, biases 0."""
    section = recipe.network
    slope = section.activation_param if section.activation == "leaky_relu" else 0.0
    gain = 1.0 if section.activation == "identity" else nn.init.calculate_gain("leaky_relu", slope)
    init_ = getattr(nn.init, section.weight_init + "_")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if section.weight_init.startswith("kaiming"):
                init_(module.weight, slope)
            else:
                init_(module.weight, gain * section.weight_gain_multiplier)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, CLASSIFIER_GAIN)
        elif isinstance(module, ABN):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
