"""EVA and EVA-02 against timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.limits import Limits
from polymodal.modalities.image import ImageReader
from polymodal.models.presets.architecture import Vocabulary
from polymodal.models.presets.eva import EVA
from polymodal.models.weights import HubConfigs

from .reference import assert_close, assert_missing_is_named, assert_published_size, assert_same_weights, randomise
from .torchvision_pil import timm_transform
from .torchvision_stub import import_stubbed

PIXELS = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
SMALL = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2}
PREPARED = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "interpolation": "bicubic", "crop_pct": 1.0}


def build(config: dict[str, Any]) -> Any:
    timm = import_stubbed("timm")
    args = {"num_classes": config["num_classes"], **config["model_args"]}
    if "global_pool" in config:
        args["global_pool"] = config["global_pool"]
    return timm.create_model(config["architecture"], **args).eval()


def make(folder: Path, name: str, **config: Any) -> Any:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    data = {"architecture": name, "num_classes": 0, "model_args": SMALL, "pretrained_cfg": PREPARED, **config}
    torch.manual_seed(0)
    reference = build(data)
    buffers = {key: value.clone() for key, value in reference.named_buffers()}
    randomise(reference)
    for key, value in reference.named_buffers():
        value.copy_(buffers[key])
    (folder / "config.json").write_text(json.dumps(data))
    save_file(reference.state_dict(), folder / "model.safetensors")
    return reference


def values() -> torch.Tensor:
    mean, std = np.asarray(PREPARED["mean"]), np.asarray(PREPARED["std"])
    return torch.from_numpy(((PIXELS / 255 - mean) / std).transpose(2, 0, 1)[None]).float()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("eva_giant_patch14_224", {}),
        ("eva_giant_patch14_224", {"global_pool": "token", "num_classes": 3}),
        ("eva02_small_patch14_224", {}),
        ("eva02_base_patch14_224", {"num_classes": 3}),
        ("eva02_base_patch16_clip_224", {"global_pool": "token"}),
        ("eva02_enormous_patch14_clip_224", {"global_pool": "token"}),
        ("eva02_enormous_patch14_clip_224", {"num_classes": 3}),
        ("eva02_large_patch14_clip_336", {"model_args": {**SMALL, "img_size": 42}}),
    ],
)
def test_features_equal_the_reference(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    reference = make(tmp_path / "theirs", name, **config)
    model = pm.load(tmp_path / "theirs")
    size = model.recipe.model.streams["image"].encoder.image_size
    with torch.inference_mode():
        pixels = values() if size == 28 else torch.nn.functional.interpolate(values(), (size, size))
        expected = reference.forward_features(pixels)
        pooled = reference.forward_head(expected, pre_logits=True)
        logits = reference(pixels)
        found = model.network.streams["image"].encoder(pixels, torch.ones(1, dtype=torch.int64))
    assert_close(found.x_UND, expected[:, 1:])
    assert_close(found.pooled_UD, pooled)
    if size == 28:
        assert_close(model.features([pm.Image(PIXELS)])[0].features, expected[:, 1:])
    if config.get("num_classes"):
        _, chances = model.classify([pm.Sample("a", views={"image": pm.Image(PIXELS)})])
        assert_close(chances, logits.softmax(1))
    assert model.export(tmp_path / "ours") == "eva"
    again = build(json.loads((tmp_path / "ours" / "config.json").read_text()))
    again.load_state_dict(load_file(tmp_path / "ours" / "model.safetensors"))
    assert_same_weights(again, reference)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make(tmp_path, "eva_giant_patch14_224")
    assert_missing_is_named(tmp_path, "blocks.1.attn.q_bias")


def test_what_is_not_built_is_refused() -> None:
    def read(**config: Any) -> None:
        EVA.model(HubConfigs({"architecture": "eva_giant_patch14_224", **config}))

    with pytest.raises(ConfigError, match="unknown EVA model 'vit_medium_patch16_rope_reg1_gap_256'"):
        read(architecture="vit_medium_patch16_rope_reg1_gap_256")
    with pytest.raises(ConfigError, match="unknown argument 'use_fc_norm'"):
        read(model_args={"use_fc_norm": True})
    with pytest.raises(ConfigError, match="found crop_mode: 'tile', expected 'center' or 'squash' or 'border'"):
        read(pretrained_cfg={"crop_mode": "tile"})
    for mode, share, expected in (("border", 0.9, "1.0"), ("squash", 0.9, "1.0"), ("center", 1.1, "at most 1.0")):
        with pytest.raises(ConfigError, match=f"found crop_mode {mode} with crop_pct {share}, expected {expected}"):
            read(pretrained_cfg={"crop_mode": mode, "crop_pct": share})
    with pytest.raises(ConfigError, match="found interpolation: 'hamming', expected"):
        read(pretrained_cfg={"interpolation": "hamming"})
    with pytest.raises(ConfigError, match=r"found input_size \[3, 336, 336\], expected \[3, 224, 224\]"):
        read(pretrained_cfg={"input_size": [3, 336, 336]})


@pytest.mark.parametrize("name", list(EVA.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    # Published as 1.0B (giant), 5.5M, 21.6M, 85.8M, 303M (EVA-02), 86.3M, 304M, 304M and 4.4B (CLIP towers).
    assert_published_size(name, lambda config: build({**config, "model_args": {}}))


SHAPES = [(28, 28), (37, 50), (61, 40), (29, 28), (28, 31), (100, 31), (9, 14)]
"""Rows and columns of pictures: squares, what is scaled up, and surplus edges that are odd."""


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize(
    "prepared",
    [
        {},
        {"crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        {"crop_pct": 1.0},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "lanczos"},
        {"crop_pct": 1.0, "crop_mode": "border"},
    ],
)
def test_pixels_of_a_file_equal_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: dict[str, Any], kind: str
) -> None:
    """A folder's own preprocessing, against timm's own function on torchvision's PIL operations."""
    prepared = {"input_size": [3, 28, 28], **prepared}
    config = {"architecture": "eva02_base_patch14_224", "model_args": SMALL, "pretrained_cfg": prepared}
    model = EVA.model(HubConfigs(config))
    reader, transform = ImageReader(model.streams["image"].reader, Limits()), timm_transform(monkeypatch, prepared)
    rng = np.random.default_rng(0)
    for height, width in SHAPES:
        file = tmp_path / f"{height}x{width}.{kind}"
        smooth = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        PIL.Image.fromarray(smooth).resize((width, height), PIL.Image.Resampling.BICUBIC).save(file)
        found = reader.read(pm.Image(file)).units[0]
        with PIL.Image.open(file) as image:
            assert_close(found, transform(image), rel=1e-3)
    again = EVA.to_hub(model, Vocabulary(0))["config.json"]
    assert EVA.model(HubConfigs(again)).streams["image"] == model.streams["image"]
    old = {"architecture": config["architecture"], "model_args": SMALL, **prepared}
    assert EVA.model(HubConfigs(old)).streams["image"] == model.streams["image"]
