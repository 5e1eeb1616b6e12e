"""CLIP against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.presets.clip import CLIP
from polymodal.models.weights import HubConfigs

from .clip_tokenizer import clip_tokenizer
from .reference import assert_close, assert_published_size, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

TEXTS = ["a red dog", "the cat on the grass, 2 dogs!", "a", "red " * 40]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def image_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


def make(folder: Path, kind: str, **text: Any) -> Any:
    tokenizer = clip_tokenizer(16)
    torch.manual_seed(0)
    texts = text_config(tokenizer, projection_dim=20, **text)
    if kind.startswith("CLIPText"):
        config: Any = transformers.CLIPTextConfig(**texts)
    elif kind.startswith("CLIPVision"):
        config = transformers.CLIPVisionConfig(**VISION, projection_dim=20)
    else:
        config = transformers.CLIPConfig(text_config=texts, vision_config=VISION, projection_dim=20, num_labels=3)
    model = randomise(getattr(transformers, kind)(config))
    save_reference(model, folder, tokenizer, image_processor())
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    make(path, "CLIPModel")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for index, (height, width) in enumerate([(37, 60), (61, 30), (24, 24)]):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        paths.append(tmp_path_factory.getbasetemp() / f"picture{index}.png")
        coarse.resize((width, height)).save(paths[-1])
    return paths


def reference_inputs(folder: Path, pictures: list[Path]) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = processor([PIL.Image.open(path) for path in pictures], return_tensors="pt")
    return {**images, **tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")}


@pytest.mark.parametrize("eos_token_id", [None, 2])
def test_embeddings_and_logits_equal_the_reference(
    tmp_path: Path, pictures: list[Path], eos_token_id: int | None
) -> None:
    reference = make(tmp_path, "CLIPModel", **({} if eos_token_id is None else {"eos_token_id": eos_token_id}))
    model = pm.load(tmp_path)
    with torch.inference_mode():
        expected = reference(**reference_inputs(tmp_path, pictures))
    images = model.embed([pm.Image(path) for path in pictures])
    texts = model.embed(TEXTS)
    assert_close(images, expected.image_embeds)
    assert_close(texts, expected.text_embeds)
    scale = float(model.network.head("projection").scale)
    assert_close(scale * images @ texts.T, expected.logits_per_image)


def test_pictures_are_prepared_as_the_reference_does(folder: Path, pictures: list[Path]) -> None:
    reader = pm.load(folder).engine.processor.streams["image"].reader
    expected = reference_inputs(folder, pictures)["pixel_values"]
    for path, values in zip(pictures, expected, strict=True):
        assert_close(reader.read(pm.Image(path)).units[0], values, rel=1e-3)


def test_texts_are_tokenised_as_the_reference_does(folder: Path) -> None:
    reader = pm.load(folder).engine.processor.streams["text"].reader
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = tokenizer(text, truncation=True, max_length=16)["input_ids"]
        assert reader.read(pm.Text(text)).units[0].tolist() == expected


def test_hidden_states_equal_the_reference(folder: Path, pictures: list[Path]) -> None:
    model, reference = pm.load(folder), transformers.CLIPModel.from_pretrained(folder)
    inputs = reference_inputs(folder, pictures)
    with torch.inference_mode():
        expected = reference.vision_model(inputs["pixel_values"])
        text = reference.text_model(inputs["input_ids"][1:2])
    found = model.features([pm.Image(path) for path in pictures])
    assert_close(np.concatenate([part.features for part in found]), expected.last_hidden_state[:, 1:])
    assert_close(np.concatenate([part.pooled for part in found]), expected.pooler_output)
    words = model.features([TEXTS[1]])[0]
    assert_close(words.features, text.last_hidden_state[0, : words.features.shape[-2]][None])


@pytest.mark.parametrize(
    "kind",
    [
        "CLIPModel",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "CLIPForImageClassification",
    ],
)
def test_every_class_loads_and_its_export_reloads_there_bit_for_bit(
    tmp_path: Path, kind: str, pictures: list[Path]
) -> None:
    reference = make(tmp_path / "theirs", kind)
    model = pm.load(tmp_path / "theirs")
    inputs = reference_inputs(tmp_path / "theirs", pictures)
    if kind != "CLIPModel":
        with torch.inference_mode():
            images = {"pixel_values": inputs["pixel_values"]}
            texts = {key: inputs[key][:1] for key in ("input_ids", "attention_mask")}
            expected = reference(**(texts if "Text" in kind else images))
        if kind == "CLIPForImageClassification":
            chances = model.classify([pm.Sample(str(i), views={"image": pm.Image(p)}) for i, p in enumerate(pictures)])
            assert_close(chances[1], expected.logits.softmax(1))
        elif kind.endswith("WithProjection"):
            parts = TEXTS[:1] if "Text" in kind else [pm.Image(path) for path in pictures]
            theirs = expected.text_embeds if "Text" in kind else expected.image_embeds
            assert_close(model.embed(parts), theirs / theirs.norm(dim=-1, keepdim=True))
        else:
            part = TEXTS[0] if "Text" in kind else pm.Image(pictures[0])
            assert_close(model.features([part])[0].pooled[0], expected.pooler_output[0])
    assert model.export(tmp_path / "ours") == "clip"
    assert_same_weights(getattr(transformers, kind).from_pretrained(tmp_path / "ours"), reference)


def test_export_answers_the_same(folder: Path, tmp_path: Path, pictures: list[Path]) -> None:
    model = pm.load(folder)
    model.export(tmp_path / "out")
    inputs, again = reference_inputs(folder, pictures), reference_inputs(tmp_path / "out", pictures)
    for key, value in inputs.items():
        assert torch.equal(value, again[key]), key
    np.testing.assert_array_equal(pm.load(tmp_path / "out").embed(TEXTS), model.embed(TEXTS))


def test_missing_and_unknown_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    stray = {**tensors, "vision_model.stray": torch.zeros(1), "vision_model.embeddings.position_ids": torch.zeros(1)}
    save_file(stray, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) unknown to clip: vision_model.stray"):
        pm.load(tmp_path)
    del tensors["logit_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) missing: logit_scale"):
        pm.load(tmp_path)


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention_dropout: 0\.1, expected 0\.0"):
        CLIP.model(HubConfigs({"model_type": "clip_vision_model", "attention_dropout": 0.1}))
    with pytest.raises(ConfigError, match="unknown activation 'mish'"):
        CLIP.model(HubConfigs({"model_type": "clip_vision_model", "hidden_act": "mish"}))


@pytest.mark.parametrize("name", list(CLIP.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    # Published as 151M, 150M, 428M and 428M.
    assert_published_size(name, lambda config: transformers.CLIPModel(transformers.CLIPConfig(**config)))
