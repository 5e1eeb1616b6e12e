"""Recipes that add to a finished run or a published checkpoint: ``extend: FOLDER``.

The model is that of the folder with what the recipe says on top: a new stream, another head. Every part that is there
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
from polymodal.models.weights.folder import is_checkpoint
from polymodal.recipes.published import Published
from polymodal.recipes.run_folder import RECIPE, WEIGHTS, missing_files
from polymodal.recipes.schema import Recipe
from polymodal.recipes.tokenizers import TOKENIZER, read_text_tokenizers
from polymodal.training.state_files import read_tensors


def resolve_extension(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with the model of the folder that it extends filled in; a resolved recipe stays as it is.

    Raises:
        CheckpointError: if there is neither a finished run nor a readable checkpoint.
        ConfigError: if the run has adapters beside its weights.
    """
    model = data.get("model") or {}
    if not isinstance(model, Mapping) or "backbone" in model:
        return dict(data)
    folder = Path(data["extend"])
    if _is_published(folder):
        return {**data, "model": _over(Published(folder).model.to_data(), model)}
    if missing := missing_files(folder):
        raise CheckpointError(
            f"extend: {folder} is no finished run: {', '.join(missing)} missing; expected one, or a checkpoint folder"
        )
    base = load_yaml((folder / RECIPE).read_text(encoding="utf-8"), str(folder / RECIPE))
    _refuse_adapters(base, folder)
    merged = {**data, "model": _over(base["model"], model)}
    for key in ("limits", "overflow"):
        if key in base:
            merged.setdefault(key, base[key])
    return merged


def _is_published(folder: Path) -> bool:
    return not (folder / RECIPE).is_file() and is_checkpoint(folder)


def _refuse_adapters(base: Mapping[str, Any], folder: Path) -> None:
    recipe = Recipe.parse({key: value for key, value in base.items() if key != "extend"}, str(folder))
    for stage in recipe.stages:
        for entry in stage.train:
            if entry.adapter is not None and not entry.is_merged:
                raise ConfigError(
                    f"extend: stage {stage.name!r} of {folder} left the adapter {entry.name!r} beside the weights; "
                    "expected a run whose adapters are merged"
                )


def _over(base: Any, new: Any, place: str = "model") -> Any:
    if isinstance(new, str) and isinstance(base, Mapping) and "use" in base:
        new = {"use": new}
    if not isinstance(base, Mapping) or not isinstance(new, Mapping):
        return copy.deepcopy(new)
    if new.get("use", base.get("use")) != base.get("use"):
        raise ConfigError(
            f"extend: {place}: found {new['use']!r}, the folder has {base.get('use')!r} there; expected what is there "
            "unchanged: only add to it"
        )
    return {**base, **{key: _over(base.get(key), value, f"{place}.{key}") for key, value in new.items()}}


def base_tokenizers(recipe: Recipe) -> tuple[Tokenizer, Mapping[str, Tokenizer]] | None:
    """The tokenizers of the run that a recipe extends; None without one: a checkpoint's stand in the recipe."""
    if recipe.extend is None or _is_published(Path(recipe.extend)):
        return None
    folder = Path(recipe.extend)
    return Tokenizer.load(folder / TOKENIZER), read_text_tokenizers(folder)


def fill_base(network: nn.Module, recipe: Recipe) -> None:
    """Put the weights of the run or checkpoint that a recipe extends into its network.

    Raises:
        CheckpointError: if the network has no place for one of them, or another shape; nothing has been changed then.
    """
    assert recipe.extend is not None
    if _is_published(Path(recipe.extend)):
        published = Published(recipe.extend)
        streams = [f"streams.{name}" for name in recipe.model.streams if name not in published.model.streams]
        heads = [f"heads.{name}" for name in recipe.model.heads if name not in published.model.heads]
        published.fill(network, without=(*streams, *heads))
        return
    path = Path(recipe.extend) / WEIGHTS
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
