"""Training recipes: their schema, and one JSON file for each published network."""

from .reading import RECIPES, find_recipe, read_recipe, recipe_from, recipe_names
from .schema import InputSection, Recipe, RecipeError

__all__ = [
    "RECIPES",
    "InputSection",
    "Recipe",
    "RecipeError",
    "find_recipe",
    "read_recipe",
    "recipe_from",
    "recipe_names",
]
