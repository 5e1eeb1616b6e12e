"""A model's weights as one safetensors file, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from polymodal.core.config import unknown
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.adapters import adapter_parameters
from polymodal.training.checkpoints import load_weights
from polymodal.training.state_files import read_tensors, write_tensors

ADAPTERS_FILE = "adapters.safetensors"
"""What a stage's adapters had learned before they were merged, in the stage's folder."""


def save_adapters(model: nn.Module, path: Path) -> None:
    """Write the adapters that train, by their names in the model; nothing where none does.

    Raises:
        CheckpointError: if the disk refuses.
    """
    trained = {name: p.detach() for name, p in adapter_parameters(model).items() if p.requires_grad}
    if trained:
        write_whole(trained, path)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write every entry of the model's state dict to ``path``; a reader sees the old file or the new one.

    Raises:
        CheckpointError: if the disk refuses; what stood at ``path`` is unharmed.
    """
    write_whole(model.state_dict(), path)


def write_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors; a reader sees the old file or the new one.

    Raises:
        CheckpointError: if the disk refuses; what stood at ``path`` is unharmed.
    """
    partial = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(partial, tensors)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written: {error}; free space, then run the same command again"
        ) from None


def read_weights(model: nn.Module, path: Path) -> None:
    """Load what :func:`save_weights` wrote into a model whose names and shapes are exactly the file's.

    Raises:
        CheckpointError: if the file is missing, damaged or of another model; the model is unchanged then.
    """
    load_weights(model, read_tensors(path), str(path))


@torch.no_grad()
def copy_weights(model: nn.Module, target: str, source: str) -> int:
    """Copy every parameter and buffer of part ``source`` to its namesake of the same shape in part ``target``.

    Returns:
        How many tensors were copied.

    Raises:
        ConfigError: if there is no such part, or the two have no tensor in common.
    """
    parts = dict(model.named_modules())
    for path in (target, source):
        if path not in parts:
            raise ConfigError(unknown("part", path, parts))
    theirs = parts[source].state_dict()
    common = {
        name: tensor
        for name, tensor in parts[target].state_dict().items()
        if name in theirs and theirs[name].shape == tensor.shape
    }
    if not common:
        raise ConfigError(f"{target} and {source} have no weights of the same name and shape; nothing would be copied")
    for name, tensor in common.items():
        tensor.copy_(theirs[name])
    return len(common)
