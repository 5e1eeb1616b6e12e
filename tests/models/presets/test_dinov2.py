"""DINOv2, with and without registers, against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.presets.dinov2 import DINOV2
from polymodal.models.weights import HubConfigs

from .reference import (
    assert_close,
    assert_missing_is_named,
    assert_published_size,
    assert_same_weights,
    randomise,
    save_reference,
)

transformers = pytest.importorskip("transformers")

PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
PLAIN, REGISTERS = "Dinov2", "Dinov2WithRegisters"


def make(folder: Path, prefix: str, kind: str, crop_px: int = 32, **config: Any) -> Any:
    shared = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    settings = getattr(transformers, f"{prefix}Config")(**{**shared, "num_labels": 3, **config})
    model = randomise(getattr(transformers, prefix + kind)(settings))
    size = {"size": {"shortest_edge": crop_px + 5}, "crop_size": {"height": crop_px, "width": crop_px}}
    save_reference(model, folder, transformers.BitImageProcessor(**size))
    return model


def prepared(folder: Path) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    values: torch.Tensor = processor([PICTURE], return_tensors="pt")["pixel_values"]
    return values


@pytest.mark.parametrize("crop_px", [32, 24, 48])
@pytest.mark.parametrize(
    ("prefix", "config"),
    [
        (PLAIN, {}),
        (PLAIN, {"use_swiglu_ffn": True}),
        (PLAIN, {"use_mask_token": False, "mlp_ratio": 3}),
        (REGISTERS, {"num_register_tokens": 3}),
        (REGISTERS, {"use_swiglu_ffn": True}),
    ],
)
def test_features_equal_the_reference(tmp_path: Path, prefix: str, config: dict[str, Any], crop_px: int) -> None:
    reference = make(tmp_path / "theirs", prefix, "Model", crop_px, **config)
    model = pm.load(tmp_path / "theirs")
    found = model.features([pm.Image(PICTURE)])[0]
    with torch.inference_mode():
        expected = reference(prepared(tmp_path / "theirs"))
    patches = (crop_px // 8) ** 2
    assert_close(found.features, expected.last_hidden_state[:, -patches:])
    assert_close(found.pooled, expected.pooler_output)
    assert model.export(tmp_path / "ours") == "dinov2"
    assert_same_weights(type(reference).from_pretrained(tmp_path / "ours"), reference)
    assert torch.equal(prepared(tmp_path / "ours"), prepared(tmp_path / "theirs"))


def test_pictures_are_prepared_as_the_reference_does(tmp_path: Path) -> None:
    make(tmp_path, PLAIN, "Model")
    reader = pm.load(tmp_path).engine.processor.streams["image"].reader
    assert_close(reader.read(pm.Image(PICTURE)).units[0], prepared(tmp_path)[0], rel=1e-3)


def test_masked_patches_equal_the_reference(tmp_path: Path) -> None:
    reference = make(tmp_path, PLAIN, "Model")
    encoder = pm.load(tmp_path).network.streams["image"].encoder
    values, is_masked = prepared(tmp_path), torch.arange(16)[None] % 3 == 0
    with torch.inference_mode():
        expected = reference(values, bool_masked_pos=is_masked)
        found = encoder(values, torch.ones(1, dtype=torch.int64), is_masked)
    assert_close(found.x_UND, expected.last_hidden_state[:, 1:])


def test_classes_equal_the_reference(tmp_path: Path) -> None:
    reference = make(tmp_path / "theirs", PLAIN, "ForImageClassification")
    model = pm.load(tmp_path / "theirs")
    _, chances = model.classify([pm.Sample("a", views={"image": pm.Image(PICTURE)})])
    with torch.inference_mode():
        assert_close(chances, reference(prepared(tmp_path / "theirs")).logits.softmax(1))
    assert model.export(tmp_path / "ours") == "dinov2"
    assert_same_weights(type(reference).from_pretrained(tmp_path / "ours"), reference)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make(tmp_path, PLAIN, "Model")
    assert_missing_is_named(tmp_path, "encoder.layer.1.layer_scale2.lambda1")


def test_an_mlp_width_that_no_ratio_gives_is_refused() -> None:
    model = DINOV2.model(HubConfigs({"model_type": "dinov2", "use_swiglu_ffn": True}))
    encoder = model.streams["image"].encoder.model_copy(update={"mlp_dim": 2049})
    stream = model.streams["image"].model_copy(update={"encoder": encoder})
    from polymodal.models.presets import Vocabulary

    with pytest.raises(ConfigError, match="found mlp_dim 2049, which no mlp_ratio of width 768 gives"):
        DINOV2.to_hub(model.model_copy(update={"streams": {"image": stream}}), Vocabulary(0))


@pytest.mark.parametrize("name", list(DINOV2.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    # Published as 22M (21M), 86M, 304M (0.3B) and 1.1B.
    assert_published_size(name)
