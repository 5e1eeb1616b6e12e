"""ViT against the reference library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError

from .reference import assert_close, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=8
    )
    torch.manual_seed(0)
    model = randomise(transformers.ViTModel(config, add_pooling_layer=False))
    return save_reference(model, tmp_path_factory.mktemp("vit"))


def test_features_equal_the_reference(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    found = pm.load(folder).features([pm.Image(pixels)])[0]
    reference = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    values = torch.from_numpy((pixels.transpose(2, 0, 1)[None] / 255.0 - 0.5) / 0.5).float()
    states = reference(values).last_hidden_state
    assert_close(found.features, states[:, 1:])
    assert_close(found.pooled, states[:, 0])


def test_export_reloads_there_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    assert pm.load(folder).export(tmp_path / "out") == "vit"
    again = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    assert_same_weights(again, transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False))


def test_missing_and_unknown_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["stray.weight"] = tensors.pop("layernorm.bias")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) missing: layernorm.bias"):
        pm.load(tmp_path)
    tensors["layernorm.bias"] = torch.zeros(32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) unknown to vit: stray.weight"):
        pm.load(tmp_path)
