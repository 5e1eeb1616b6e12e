"""A model's weights as one safetensors file, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from polymodal.core.errors import CheckpointError
from polymodal.training.checkpoints import load_weights
from polymodal.training.state_files import read_tensors, write_tensors


def save_weights(model: nn.Module, path: Path) -> None:
    """Write every entry of the model's state dict to ``path``; a reader sees the old file or the new one.

    Raises:
        CheckpointError: if the disk refuses; what stood at ``path`` is unharmed.
    """
    partial = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(partial, model.state_dict())
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
