"""What parity tests share: reference models with telling weights, and comparisons."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import polymodal as pm
from polymodal.core.errors import CheckpointError
from polymodal.models.compose import MultimodalModel
from polymodal.models.presets import find_size
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

REL = 1e-4


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Draw every parameter and floating buffer anew, so that no bias is 0 and no gain is 1; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1.0 + 0.2 * noise.abs())
        elif tensor.ndim < 2:
            tensor.add_(0.1 * noise)
        else:
            tensor.copy_(noise * (0.5 * tensor[0].numel() ** -0.5 if tensor[0].numel() > 1 else 0.1))
    return model.eval()


def save_reference(model: Any, folder: Path, *extras: Any) -> Path:
    """Save a reference model, and tokenizers or processors beside it, as the library does."""
    for part in (model, *extras):
        part.save_pretrained(folder)
    return folder


def assert_close(ours: Any, theirs: Any, rel: float = REL) -> None:
    """Largest difference relative to the reference's largest value."""
    mine, other = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (ours, theirs))
    assert mine.shape == other.shape, f"found shape {mine.shape}, expected {other.shape}"
    assert np.isfinite(mine).all()
    scale = np.abs(other).max()
    assert scale > 0, "the reference is all zeros, which proves nothing"
    worst = np.abs(mine - other).max() / scale
    _record(float(worst))
    assert worst <= rel, f"relative difference {worst:.2e}, allowed {rel:.0e}"


def _record(worst: float) -> None:
    """Add the figure to the file that ``scripts/make_models.py`` asks for."""
    path = os.environ.get("POLYMODAL_PARITY_FILE")
    if path is not None:
        test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "relative": worst}) + "\n")


def assert_missing_is_named(folder: Path, tensor: str, count: int = 1) -> None:
    """A copy of a checkpoint without one stored tensor, which ``count`` tensors of ours come from, is refused."""
    with tempfile.TemporaryDirectory() as place:
        broken = shutil.copytree(folder, Path(place) / "broken")
        tensors = load_file(broken / "model.safetensors")
        del tensors[tensor]
        save_file(tensors, broken / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{count} tensor\(s\) missing: {re.escape(tensor)}"):
            pm.load(broken)


def assert_published_size(name: str, build: Callable[[Any], nn.Module] | None = None, rows: int = 1) -> None:
    """A published size has as many parameters here and in the reference as the table of sizes says.

    Args:
        name: of the size.
        build: its config -> the reference; None builds the class that the config names.
        rows: of the token embedding, where they follow from the tokenizer alone.
    """
    architecture, size = find_size(name)
    model = architecture.model(HubConfigs(size.config, size.preprocessor))
    with no_weights():
        ours = MultimodalModel(model, model.tokenizer.rows or rows)
    with torch.device("meta"):
        reference = (build or _named)(size.config)
    assert num_parameters(ours) == num_parameters(reference) == size.parameters


def _named(config: Mapping[str, Any]) -> Any:
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class(**config))
    model.tie_weights()
    return model


def assert_same_weights(one: Any, other: Any) -> None:
    """Two reference models hold the same tensors, bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
