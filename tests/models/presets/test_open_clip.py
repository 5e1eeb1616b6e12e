"""Checkpoints of open_clip against that library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.core.limits import Limits
from polymodal.modalities.image import ImageReader
from polymodal.models.presets import eva
from polymodal.models.presets.architecture import Vocabulary
from polymodal.models.presets.open_clip import OPEN_CLIP
from polymodal.models.weights import HubConfigs

from .clip_tokenizer import clip_tokenizer
from .reference import assert_close, assert_published_size, assert_same_weights, randomise
from .torchvision_pil import open_clip_transform
from .torchvision_stub import import_stubbed

transformers = pytest.importorskip("transformers")

TEXTS = ["a red dog", "the cat on the grass, 2 dogs!", "red " * 40]
_RNG = np.random.default_rng(0)
PICTURES = [PIL.Image.fromarray(_RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(2)]
VISION = {"image_size": 24, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 1.5}
TEXT = {"context_length": 16, "width": 24, "heads": 2, "layers": 2}


def build(config: dict[str, Any]) -> Any:
    library = import_stubbed("open_clip")
    kind = library.model.CustomTextCLIP if config.get("custom_text") else library.model.CLIP
    return kind(**{key: value for key, value in config.items() if key != "custom_text"}).eval()


def make(folder: Path, *, own_vision: bool = False, **config: Any) -> Any:
    from safetensors.torch import save_file

    tokenizer = clip_tokenizer(16)
    vision, text = config.pop("vision_cfg", {}), {"vocab_size": len(tokenizer), **TEXT}
    model = {"embed_dim": 20, "vision_cfg": vision if own_vision else {**VISION, **vision}, "text_cfg": text, **config}
    torch.manual_seed(0)
    reference = build(model)
    masks = {name: mask.clone() for name, mask in reference.named_buffers()}
    randomise(reference)  # causal masks and rotary tables are buffers, and no weights
    for name, mask in reference.named_buffers():
        mask.copy_(masks[name])
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.3, 0.2, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    data = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(data))
    save_file(reference.state_dict(), folder / "open_clip_model.safetensors")
    return reference


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"custom_text": True},
        {"quick_gelu": True},
        {"init_logit_bias": -10.0, "vision_cfg": {"ls_init_value": 0.1, "no_ln_pre": True}},
        {"vision_cfg": {"final_ln_after_pool": True}},
    ],
)
def test_embeddings_equal_the_reference(tmp_path: Path, config: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    reference = make(tmp_path / "theirs", **config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    model = pm.load(tmp_path / "theirs")
    pixels = np.stack([np.asarray(picture) for picture in PICTURES]).transpose(0, 3, 1, 2) / 255
    mean, std = (np.array(x)[:, None, None] for x in ([0.4, 0.5, 0.6], [0.3, 0.2, 0.25]))
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        images = reference.encode_image(torch.from_numpy((pixels - mean) / std).float(), normalize=True)
        texts = reference.encode_text(ids, normalize=True)
    assert_close(model.embed([pm.Image(picture) for picture in PICTURES]), images)
    assert_close(model.embed(TEXTS), texts)
    assert_close(model.network.head("projection").scale, reference.logit_scale.exp().clamp(max=100))

    assert model.export(tmp_path / "ours", "open_clip") == "open_clip"
    data = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())
    again = build(data["model_cfg"])
    again.load_state_dict(load_file(tmp_path / "ours" / "open_clip_model.safetensors"))
    if config.get("custom_text"):
        again.load_state_dict(again.state_dict())
        assert {name.removeprefix("text.") for name in reference.state_dict()} == set(again.state_dict())
    else:
        assert_same_weights(again, reference)
    np.testing.assert_array_equal(pm.load(tmp_path / "ours").embed(TEXTS), model.embed(TEXTS))


@pytest.mark.parametrize(
    "name", ["eva_giant_patch14_224", "eva02_base_patch16_clip_224", "eva02_enormous_patch14_clip_224"]
)
def test_an_eva_tower_equals_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from safetensors.torch import load_file

    # The layout holds a model's name and no sizes: both sides get a small model of that name.
    small = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    timm = import_stubbed("open_clip").timm_model.timm
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: real(*args, **{**kwargs, **small}))
    monkeypatch.setitem(eva.TIMM, name, {**eva.TIMM[name], **small})
    vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": None, "image_size": 24}
    reference = make(tmp_path / "theirs", own_vision=True, vision_cfg=vision, custom_text=True)
    model = pm.load(tmp_path / "theirs")
    pixels = np.asarray(PICTURES[0]).transpose(2, 0, 1)[None] / 255
    mean, std = (np.array(x)[:, None, None] for x in ([0.4, 0.5, 0.6], [0.3, 0.2, 0.25]))
    with torch.inference_mode():
        expected = reference.encode_image(torch.from_numpy((pixels - mean) / std).float(), normalize=True)
    assert_close(model.embed([pm.Image(PICTURES[0])]), expected)
    assert model.export(tmp_path / "ours") == "open_clip"
    data = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())
    assert data["model_cfg"]["vision_cfg"]["timm_model_name"] == name
    again = build(data["model_cfg"])
    again.load_state_dict(load_file(tmp_path / "ours" / "open_clip_model.safetensors"))
    assert_same_weights(again, reference)


def test_a_folder_with_both_layouts_is_read_as_the_hubs(tmp_path: Path) -> None:
    make(tmp_path / "both")
    config = {"model_type": "vit", "hidden_size": 32, "num_attention_heads": 4}
    (tmp_path / "both" / "config.json").write_text(json.dumps(config))
    assert set(pm.load(tmp_path / "both").recipe.model.streams) == {"image", "text"}
    (tmp_path / "both" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        pm.load(tmp_path / "both")


@pytest.mark.parametrize(
    ("where", "more", "message"),
    [
        ("vision_cfg", {"timm_model_name": "resnet50"}, "found 'timm_model_name', expected keys of"),
        ("vision_cfg", {"attentional_pool": True}, "found attentional_pool: True, expected False"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "found 'hf_model_name', expected keys of"),
    ],
)
def test_what_is_not_built_is_refused(where: str, more: dict[str, Any], message: str) -> None:
    model = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}
    model[where] = more
    with pytest.raises(ConfigError, match=message):
        OPEN_CLIP.model(HubConfigs({"model_type": "open_clip", "model_cfg": model}))


@pytest.mark.parametrize("name", list(OPEN_CLIP.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    # Published as 151M, 150M, 428M, 986M, 1.37B and 2.54B; EVA-02 E as 4.70B and 5.04B.
    assert_published_size(name, lambda config: build(dict(config["model_cfg"])))


SHAPES = [(24, 24), (37, 50), (61, 40), (25, 24), (24, 27), (100, 31), (9, 14)]
"""Rows and columns of pictures: squares, what is scaled up, and surplus edges that are odd."""


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize(
    "preprocess",
    [
        {},
        {"interpolation": "bilinear", "size": 99},
        {"resize_mode": "squash", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        {"resize_mode": "longest", "fill_color": 0},
        {"resize_mode": "longest", "fill_color": 130, "interpolation": "bilinear"},
    ],
)
def test_pixels_of_a_file_equal_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preprocess: dict[str, Any], kind: str
) -> None:
    """A folder's own preprocessing, against the package's own function on torchvision's PIL operations."""
    model = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {"vocab_size": 99, **TEXT}}
    configs = HubConfigs({"model_type": "open_clip", "model_cfg": model, "preprocess_cfg": preprocess})
    config = OPEN_CLIP.model(configs).streams["image"].reader
    transform = open_clip_transform(monkeypatch, preprocess, VISION["image_size"])
    reader = ImageReader(config, Limits())
    for height, width in SHAPES:
        file = tmp_path / f"{height}x{width}.{kind}"
        smooth = _RNG.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        PIL.Image.fromarray(smooth).resize((width, height), PIL.Image.Resampling.BICUBIC).save(file)
        found = reader.read(pm.Image(file)).units[0]
        with PIL.Image.open(file) as image:
            assert_close(found, transform(image), rel=1e-3)


def test_the_preprocessing_is_given_back() -> None:
    model = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {"vocab_size": 99, **TEXT}}
    for mode in ("shortest", "longest", "squash"):
        preprocess = {"resize_mode": mode, "fill_color": 7 if mode == "longest" else 0, "interpolation": "bilinear"}
        found = OPEN_CLIP.model(HubConfigs({"model_cfg": model, "preprocess_cfg": preprocess}))
        config = OPEN_CLIP.to_hub(found, Vocabulary(99))["open_clip_config.json"]
        assert preprocess.items() <= config["preprocess_cfg"].items()
        assert OPEN_CLIP.model(HubConfigs(config)).streams["image"] == found.streams["image"]
    for key, value in {"resize_mode": "tile", "interpolation": "lanczos", "mode": "L"}.items():
        with pytest.raises(ConfigError, match=f"found {key}: '{value}', expected"):
            OPEN_CLIP.model(HubConfigs({"model_cfg": model, "preprocess_cfg": {key: value}}))
