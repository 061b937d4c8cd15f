"""The former place of `iabn_hub.recipes`, for one release."""

import warnings

from ..recipes import Recipe, RecipeError, find_recipe, read_recipe

__all__ = ["Recipe", "RecipeError", "find_recipe", "read_recipe"]

warnings.warn("iabn_hub.training.recipe is now iabn_hub.recipes", DeprecationWarning, stacklevel=2)
