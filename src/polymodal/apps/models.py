"""presets and export."""

from __future__ import annotations

import sys
from pathlib import Path

from polymodal.apps.output import emit_json, emit_table, say
from polymodal.core.config import load_yaml
from polymodal.models.presets import ARCHITECTURES
from polymodal.recipes.loading import load_recipe, preset_names, preset_text
from polymodal.recipes.run_adapters import export_run_adapters
from polymodal.recipes.stored_models import load


def presets(*, as_json: bool) -> None:
    """List the recipes that ship with the package, and the published sizes."""
    recipes = [load_recipe(name) for name in preset_names()]
    data = [
        {
            "name": recipe.name,
            "streams": list(recipe.model.streams),
            "backbone": recipe.model.backbone.use,
            "stages": {stage.name: stage.steps for stage in recipe.stages},
        }
        for recipe in recipes
    ]
    published = [
        {"name": name, "architecture": architecture.name, "source": architecture.source, "parameters": size.parameters}
        for architecture in ARCHITECTURES.values()
        for name, size in architecture.sizes.items()
    ]
    if as_json:
        emit_json({"presets": data, "published": published})
        return
    rows = [
        (
            recipe.name,
            ", ".join(recipe.model.streams),
            recipe.model.backbone.use,
            ", ".join(f"{stage.name} {stage.steps:,}" for stage in recipe.stages),
        )
        for recipe in recipes
    ]
    emit_table("presets", ("name", "streams", "backbone", "stages and steps"), rows)
    sizes = [
        (name, architecture.name, f"{size.parameters / 1e6:,.1f} M", architecture.source)
        for architecture in ARCHITECTURES.values()
        for name, size in architecture.sizes.items()
    ]
    emit_table("published models", ("name", "architecture", "parameters", "source"), sizes)


def show_preset(name: str, *, as_json: bool) -> None:
    """Print a preset as it was written, comments included, or a published size, ready to edit."""
    text = preset_text(name)
    if as_json:
        emit_json(load_yaml(text, name))
        return
    sys.stdout.write(text)


def export(model: Path, out: Path, architecture: str | None, *, as_json: bool) -> None:
    """Write a run's model in the layout of its published architecture."""
    name = load(model, device="cpu").export(out, architecture)
    if as_json:
        emit_json({"out": str(out), "architecture": name})
        return
    say(f"{out}: written as {name}; transformers' from_pretrained reads it")


def export_adapters(run: Path, out: Path, *, as_json: bool) -> None:
    """Write what a run's adapters learned in the hub's layout."""
    written = export_run_adapters(run, out)
    if as_json:
        emit_json({"out": [str(path) for path in written]})
        return
    for path in written:
        say(f"{path}: written; peft reads it, and so does load_adapter")
