"""Recipes that add to a finished run: ``extend: RUN``.

The model is that of the run with what the recipe says on top: a new stream, another head. Every part that the run has
starts with its weights; what is new starts at random. With everything old frozen, old inputs give the same to the bit::

    name: with-sound
    extend: runs/pictures
    model: {streams: {sound: {modality: audio, encoder: {...}, enters: sequence}}}
    stages: [{name: hear, train: [streams.sound], data: [sounds.jsonl], ...}]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from polymodal.core.config import load_yaml
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.modalities.text import Tokenizer
from polymodal.recipes.schema import Recipe
from polymodal.recipes.tokenizers import read_text_tokenizers
from polymodal.training.state_files import read_tensors

_FILES = ("recipe.yaml", "tokenizer.json", "model.safetensors")


def resolve_extension(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with the model of the run that it extends filled in; a resolved recipe stays as it is.

    Raises:
        CheckpointError: if there is no finished run.
        ConfigError: if the run has adapters beside its weights.
    """
    model = data.get("model") or {}
    if not isinstance(model, Mapping) or "backbone" in model:
        return dict(data)
    folder = Path(data["extend"])
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"extend: {folder} is no finished run: {', '.join(missing)} missing; expected one")
    base = load_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml"))
    _refuse_adapters(base, folder)
    merged = {**data, "model": _over(base["model"], model)}
    for key in ("limits", "overflow"):
        if key in base:
            merged.setdefault(key, base[key])
    return merged


def _refuse_adapters(base: Mapping[str, Any], folder: Path) -> None:
    recipe = Recipe.parse({key: value for key, value in base.items() if key != "extend"}, str(folder))
    for stage in recipe.stages:
        for entry in stage.train:
            if entry.adapter is not None and not entry.is_merged:
                raise ConfigError(
                    f"extend: stage {stage.name!r} of {folder} left the adapter {entry.name!r} beside the weights; "
                    "expected a run whose adapters are merged"
                )


def _over(base: Any, new: Any) -> Any:
    if isinstance(base, Mapping) and isinstance(new, Mapping):
        return {**base, **{key: _over(base.get(key), value) for key, value in new.items()}}
    return copy.deepcopy(new)


def base_tokenizers(recipe: Recipe) -> tuple[Tokenizer, Mapping[str, Tokenizer]] | None:
    """The tokenizers of the run that a recipe extends; None without one."""
    if recipe.extend is None:
        return None
    folder = Path(recipe.extend)
    return Tokenizer.load(folder / "tokenizer.json"), read_text_tokenizers(folder)


def fill_base(network: nn.Module, recipe: Recipe) -> None:
    """Put the weights of the run that a recipe extends into its network.

    Raises:
        CheckpointError: if the network has no place for one of them, or another shape; nothing has been changed then.
    """
    assert recipe.extend is not None
    path = Path(recipe.extend) / "model.safetensors"
    stored, own = read_tensors(path), network.state_dict()
    strange = [name for name in stored if name not in own or own[name].shape != stored[name].shape]
    if strange:
        name = strange[0]
        found = f"the shape {list(own[name].shape)}" if name in own else "nothing of that name"
        raise CheckpointError(
            f"{path}: {len(strange)} tensors do not fit the extended model, such as {name} of shape "
            f"{list(stored[name].shape)}: found {found}; expected every part of the run unchanged: only add to it"
        )
    network.load_state_dict(stored, strict=False)
