"""ResNet against the reference library, and its batch norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.encoders.resnet import ResnetConfig
from polymodal.models.presets.resnet import RESNET
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

PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8))


def make(folder: Path, kind: str, size_px: int = 40, **config: Any) -> Any:
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 3}
    model = randomise(getattr(transformers, kind)(transformers.ResNetConfig(**{**shape, **config})))
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": size_px}, crop_pct=0.875)
    save_reference(model, folder, processor)
    return model


def prepared(folder: Path) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    values: torch.Tensor = processor([PICTURE], return_tensors="pt")["pixel_values"]
    return values


@pytest.mark.parametrize(
    "config",
    [{}, {"downsample_in_bottleneck": True}, {"layer_type": "basic", "hidden_sizes": [8, 16]}],
)
def test_features_equal_the_reference(tmp_path: Path, config: dict[str, Any]) -> None:
    reference = make(tmp_path / "theirs", "ResNetModel", **config)
    model = pm.load(tmp_path / "theirs")
    found = model.features([pm.Image(PICTURE)])[0]
    with torch.inference_mode():
        expected = reference(prepared(tmp_path / "theirs"))
    assert_close(found.features, expected.last_hidden_state.flatten(2).transpose(1, 2))
    assert_close(found.pooled, expected.pooler_output.flatten(1))
    assert model.export(tmp_path / "ours") == "resnet"
    assert_same_weights(transformers.ResNetModel.from_pretrained(tmp_path / "ours"), reference)
    assert torch.equal(prepared(tmp_path / "ours"), prepared(tmp_path / "theirs"))


def test_classes_equal_the_reference(tmp_path: Path) -> None:
    reference = make(tmp_path / "theirs", "ResNetForImageClassification")
    model = pm.load(tmp_path / "theirs")
    _, chances = model.classify([pm.Sample("a", views={"image": pm.Image(PICTURE)})])
    with torch.inference_mode():
        assert_close(chances, reference(prepared(tmp_path / "theirs")).logits.softmax(1))
    assert model.export(tmp_path / "ours") == "resnet"
    assert_same_weights(transformers.ResNetForImageClassification.from_pretrained(tmp_path / "ours"), reference)


@pytest.mark.parametrize("size_px", [40, 384])
def test_pictures_are_prepared_as_the_reference_does(tmp_path: Path, size_px: int) -> None:
    make(tmp_path, "ResNetModel", size_px)
    reader = pm.load(tmp_path).engine.processor.streams["image"].reader
    assert_close(reader.read(pm.Image(PICTURE)).units[0], prepared(tmp_path)[0], rel=1e-3)


def test_running_statistics_move_only_where_the_weights_do() -> None:
    torch.manual_seed(0)
    encoder = ResnetConfig(width=16, blocks=(1, 1), stem_width=8, image_size=32).build().train()
    images, lengths = torch.randn(4, 3, 32, 32), torch.ones(4, dtype=torch.int64)
    encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    alone = encoder(images[:1], lengths[:1]).pooled_UD
    torch.testing.assert_close(encoder(images, lengths).pooled_UD[:1], alone)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    encoder.requires_grad_(True)
    encoder(images, lengths)
    assert not torch.equal(encoder.stem.norm.running_mean, before["stem.norm.running_mean"])
    assert encoder.stem.norm.num_batches_tracked == 1


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make(tmp_path, "ResNetModel")
    assert_missing_is_named(tmp_path, "embedder.embedder.normalization.running_var")


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found hidden_sizes \[256, 512, 768\], expected each twice the one before"):
        RESNET.model(HubConfigs({"model_type": "resnet", "hidden_sizes": [256, 512, 768]}))
    with pytest.raises(ConfigError, match="width 100 is not a multiple of 32"):
        ResnetConfig.parse({"width": 100, "block": "bottleneck"})
    with pytest.raises(ConfigError, match="'stride_first' belongs to block: bottleneck"):
        ResnetConfig.parse({"stride_first": True})


@pytest.mark.parametrize("name", list(RESNET.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    # Published as 11.7M, 21.8M, 25.6M, 44.5M and 60.2M.
    assert_published_size(
        name, lambda config: transformers.ResNetForImageClassification(transformers.ResNetConfig(**config))
    )
