"""Adapters in and out, in the hub's layout: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.adapters import Adapter, adapted_modules, adapter_names
from polymodal.models.adapters.apply import check_name
from polymodal.models.adapters.base import attach
from polymodal.models.weights.folder import check_new
from polymodal.recipes.adapter_layout import to_layout
from polymodal.recipes.adapter_names import hub_names
from polymodal.recipes.adapter_reading import read_layout
from polymodal.recipes.published import find_folder
from polymodal.recipes.schema import Recipe
from polymodal.training.state_files import read_tensors, write_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def load_adapter(recipe: Recipe, network: nn.Module, source: str | os.PathLike[str], name: str) -> list[str]:
    """Give a model the adapter of a folder; it acts from now on.

    Args:
        recipe: of the model.
        network: changed in place.
        source: the folder, or a hub id.
        name: what to call it; no adapter of the model has that name yet.

    Returns:
        The paths of the adapted modules.

    Raises:
        CheckpointError: if the folder is no adapter, a tensor of it matches nothing in the model (all are listed), has
            another shape, or one of its own is missing.
        ConfigError: if the name is taken, or the adapter is of a kind that has no native form.
    """
    check_name(name, "load_adapter")
    if name in adapter_names(network):
        raise ConfigError(f"load_adapter: the model has an adapter {name!r} already; choose another name")
    folder = find_folder(source)
    config, tensors = _read(folder)
    adapters = read_layout(config, tensors, network, hub_names(recipe, network), str(folder))
    paths = [path for path, _ in network.named_modules() if path in adapters]
    for path in paths:
        attach(network.get_submodule(path), name, adapters[path].requires_grad_(False))
    return paths


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: holds no readable {CONFIG_FILE}: {error}; expected an adapter") from None
    weights = folder / WEIGHTS_FILE
    old = folder / "adapter_model.bin"
    if weights.is_file() or not old.is_file():
        return config, read_tensors(weights)
    try:
        return config, torch.load(old, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (the loader raises whatever a damaged or hostile file provokes)
        raise CheckpointError(f"{old}: cannot be read without running code from it: {error}") from None


def export_adapter(recipe: Recipe, network: nn.Module, name: str, out: str | os.PathLike[str]) -> Path:
    """Write one adapter of a model in the hub's layout, under the names of the checkpoint that the model came from.

    A bottleneck has no form there; it is written under our names, for :func:`load_adapter`.

    Args:
        recipe: of the model.
        network: the model.
        name: of the adapter.
        out: a new or empty folder.

    Raises:
        ConfigError: if there is no adapter of that name, or the layout cannot hold it.
        CheckpointError: if ``out`` is not empty.
    """
    folder = Path(out)
    check_new(folder)
    adapters: dict[str, Adapter] = {
        path: inner.adapters[name]  # type: ignore[misc]
        for path, inner in adapted_modules(network)
        if name in inner.adapters
    }
    if not adapters:
        raise ConfigError(f"export: the model has no adapter {name!r}; it has: {adapter_names(network)}")
    config, tensors = to_layout(adapters, hub_names(recipe, network), f"export of {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    plain = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS_FILE, plain)
    return folder
