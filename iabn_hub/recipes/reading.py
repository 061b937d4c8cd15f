"""Find recipes, read them, and apply changes from the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..schema import load_json, parse, read_json
from .rules import check_recipe
from .schema import Recipe, RecipeError

_logger = logging.getLogger(__name__)
RECIPES = Path(__file__).parent
# Keys of the first release, which are still read.
RENAMED_KEYS = {
    "training.accumulate": "accumulation_steps",
    "segmentation.uniform": "class_balanced",
    "segmentation.ignore": "ignore_index",
    "segmentation.longest_val": "long_side_val",
}


def find_recipe(name: str, folder: Path = RECIPES) -> Path:
    """The JSON file of this name, or the recipe of this name in `folder`.

    Raises:
        RecipeError: there is none; the message lists the recipes.
    """
    path = Path(name)
    if not path.is_file() and path.suffix != ".json":
        path = folder / f"{name}.json"
    if not path.is_file():
        raise RecipeError(f"{name}: there is no such file or recipe; there are {', '.join(recipe_names(folder))}")
    return path


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """The names of the recipes in a folder."""
    return sorted(path.stem for path in folder.glob("*.json"))


def read_recipe(path: Path | str, changes: Iterable[str] = ()) -> Recipe:
    """The recipe in a JSON file, with `changes` such as 'optimizer.learning_rate=0.05' applied to it.

    Raises:
        RecipeError: not JSON; unknown keys, wrong types, values that are impossible, alone or together.
    """
    content = _with_new_keys(load_json(Path(path), RecipeError), str(path))
    for change in changes:
        _apply(content, change)
    return recipe_from(content, str(path))


def recipe_from(content: Any, path: str) -> Recipe:
    """The recipe of parsed JSON; `path` is for messages.

    Raises:
        RecipeError: as `read_recipe`.
    """

    def refuse(sentence: str) -> RecipeError:
        return RecipeError(f"{path}: {sentence}")

    recipe = parse(Recipe, _with_new_keys(content, path), refuse)
    check_recipe(recipe, refuse)
    return recipe


def _with_new_keys(content: Any, path: str) -> Any:
    if not isinstance(content, dict):
        return content
    content = {name: dict(value) if isinstance(value, dict) else value for name, value in content.items()}
    for old, key in RENAMED_KEYS.items():
        name, _, old_key = old.partition(".")
        section = content.get(name)
        if isinstance(section, dict) and old_key in section:
            _logger.warning("%s: %s is now called %s.%s", path, old, name, key)
            section[key] = section.pop(old_key)
    return content


def _apply(content: Any, change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"{change!r} is not of the form section.key=value, such as optimizer.learning_rate=0.05")
    *sections, last = key.split(".")
    for name in sections:
        if not isinstance(content, dict):
            break
        content = content.setdefault(name, {})
    if not isinstance(content, dict):
        raise RecipeError(f"{change!r}: {'.'.join(sections)} has no keys")
    try:
        content[last] = read_json(value)
    except json.JSONDecodeError:
        content[last] = value  # a word without quotes
    except ValueError as e:
        raise RecipeError(f"{change[:80]!r}: {e}") from e
