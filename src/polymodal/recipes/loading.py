"""Recipes from files: presets by name, YAML by path, overrides on top."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from polymodal.core.config import apply_overrides, load_yaml, unknown
from polymodal.core.errors import ConfigError
from polymodal.recipes.schema import Recipe

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_text(name: str) -> str:
    """The YAML of a preset, comments included, or that of a published size.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in preset_names():
        return yaml.safe_dump(_preset(name), sort_keys=False, width=120)
    return (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(recipe: str | os.PathLike[str] | dict[str, Any] | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a preset name, a YAML file, plain data or a recipe, with overrides applied.

    Raises:
        ConfigError: if it is not found or not valid; names the key and the valid ones.
    """
    if isinstance(recipe, Recipe):
        overrides = list(overrides)
        return load_recipe(recipe.to_data(), overrides) if overrides else recipe
    if isinstance(recipe, dict):
        data, where = recipe, "recipe"
    else:
        path = Path(recipe)
        if not path.is_file():
            data, where = _preset(os.fspath(recipe)), str(recipe)
        else:
            data, where = load_yaml(_read(path), str(recipe)), str(recipe)
    data = apply_overrides(data, overrides)
    if data.get("extend") is not None:
        from polymodal.recipes.extending import resolve_extension

        data = resolve_extension(data)
    if _names_checkpoints(data.get("model")):
        # Only recipes that take parts of published checkpoints pay for reading them.
        from polymodal.recipes.published import resolve

        data = resolve(data)
    return Recipe.parse(data, where)


def _preset(name: str) -> dict[str, Any]:
    """A preset's data: a file of the package, or a published size."""
    if name in preset_names():
        return load_yaml(_read(PRESETS / f"{name}.yaml"), name)
    from polymodal.models.presets import published_names
    from polymodal.recipes.published import published_recipe

    if name in published_names():
        return published_recipe(name)
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{name}: is a folder, expected a YAML file or the name of a preset")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        beside = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {str(path.with_name(near[0]))!r}?" if near else "expected a recipe in YAML"
        raise ConfigError(f"{name}: there is no such file; {hint}")
    # The published sizes are many: only those that resemble the name are listed.
    valid = [*preset_names(), *difflib.get_close_matches(name, published_names(), n=5)]
    raise ConfigError(
        f"{name}: is no file, and {unknown('preset', name, valid)}; 'polymodal presets list' shows the published sizes"
    )


def _names_checkpoints(value: Any) -> bool:
    """Whether ``from`` stands anywhere in a model's data."""
    return isinstance(value, dict) and ("from" in value or any(_names_checkpoints(item) for item in value.values()))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {error}; expected a YAML file in UTF-8") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; :func:`load_recipe` reads it back to an equal value."""
    return yaml.safe_dump(recipe.to_data(), sort_keys=False, width=120)
