"""ViT against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError, SampleError
from polymodal.models.compose import to_device
from polymodal.models.presets.labels import class_names
from polymodal.models.presets.vit import VIT
from polymodal.models.weights import HubConfigs

from .reference import assert_close, assert_published_size, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
VALUES = torch.from_numpy((PIXELS.transpose(2, 0, 1)[None] / 255.0 - 0.5) / 0.5).float()


def make(folder: Path, kind: str, **options: Any) -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=24,
        patch_size=8,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = randomise(getattr(transformers, kind)(config, **options))
    save_reference(model, folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit")
    make(path, "ViTModel")
    return path


@pytest.mark.parametrize("has_pooler", [True, False])
def test_features_equal_the_reference(tmp_path: Path, has_pooler: bool) -> None:
    reference = make(tmp_path / "theirs", "ViTModel", add_pooling_layer=has_pooler)
    model = pm.load(tmp_path / "theirs")
    found = model.features([pm.Image(PIXELS)])[0]
    with torch.inference_mode():
        states = reference(VALUES)
    assert_close(found.features, states.last_hidden_state[:, 1:])
    assert_close(found.pooled, states.pooler_output if has_pooler else states.last_hidden_state[:, 0])
    assert model.export(tmp_path / "ours") == "vit"
    again = transformers.ViTModel.from_pretrained(tmp_path / "ours", add_pooling_layer=has_pooler)
    assert_same_weights(again, reference)
    assert pm.load(tmp_path / "ours").recipe.model == model.recipe.model


def test_classes_equal_the_reference(tmp_path: Path) -> None:
    reference = make(tmp_path / "theirs", "ViTForImageClassification")
    model = pm.load(tmp_path / "theirs")
    label, chances = model.classify([pm.Sample("a", views={"image": pm.Image(PIXELS)})])
    with torch.inference_mode():
        expected = reference(VALUES).logits.softmax(1)
    assert_close(chances, expected)
    assert label == [f"LABEL_{int(expected.argmax())}"]
    assert model.export(tmp_path / "ours") == "vit"
    assert_same_weights(transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours"), reference)


@pytest.mark.parametrize("options", [{}, {"size": {"height": 24, "width": 24}, "resample": 3, "do_normalize": False}])
def test_pictures_are_prepared_as_the_reference_does(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    processor = transformers.ViTImageProcessor(**{"size": {"height": 24, "width": 24}, **options})
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(1)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (50, 33, 3), dtype=np.uint8))
    expected = processor([picture], return_tensors="pt")["pixel_values"][0]
    reader = pm.load(tmp_path).engine.processor.streams["image"].reader
    assert_close(reader.read(pm.Image(picture)).units[0], expected, rel=1e-3)


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


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="found qkv_bias: False, expected True"):
        VIT.model(HubConfigs({"model_type": "vit", "qkv_bias": False}))
    odd = {"image_processor_type": "PerceiverImageProcessor"}
    with pytest.raises(ConfigError, match="found 'PerceiverImageProcessor', expected one of CLIPImageProcessor"):
        VIT.model(HubConfigs({"model_type": "vit"}, odd))
    oblong = {"size": {"height": 224, "width": 448}}
    with pytest.raises(ConfigError, match="expected a square, or a shortest edge with a square centre crop"):
        VIT.model(HubConfigs({"model_type": "vit"}, oblong))


def test_equal_class_names_are_told_apart() -> None:
    assert class_names({"id2label": {"0": "crane", "1": "cat", "2": "crane"}}) == ("crane", "cat", "crane (2)")


@pytest.mark.parametrize("name", list(VIT.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    # Published as 86M (base), 307M (large, 304M without the pooler) and 632M (huge).
    assert_published_size(name)


def test_a_sample_without_the_classified_stream_is_named(tmp_path: Path) -> None:
    make(tmp_path, "ViTForImageClassification")
    model = pm.load(tmp_path)
    batch = model.engine.processor.batch([pm.Sample("seen", views={"image": pm.Image(PIXELS)})])
    batch.sample_ids.append("unseen")
    with pytest.raises(SampleError, match="unseen: has no item of the stream 'image', which is classified"):
        model.network(to_device(batch, "cpu"), passes=("merge",))
