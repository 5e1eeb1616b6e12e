"""SigLIP and SigLIP 2 against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.presets.siglip import SIGLIP
from polymodal.models.weights import HubConfigs

from .reference import assert_close, assert_published_size, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

TEXTS = ["a red dog", "the cat on the grass", "a", "red " * 40]
_RNG = np.random.default_rng(0)
PICTURES = [PIL.Image.fromarray(_RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((37, 60), (29, 24))]
STACK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def make_tokenizer() -> Any:
    letters = {piece: place + 5 for place, piece in enumerate("\u2581abcdefghijklmnopqrstuvwxyz,!")}
    controls = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    tokenizer = transformers.Siglip2Tokenizer(vocab={**controls, **letters}, merges=[], padding_side="right")
    tokenizer.add_eos_token, tokenizer.add_bos_token = True, False
    tokenizer.update_post_processor()
    return tokenizer


def make(folder: Path, kind: str, **vision: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    images = {**STACK, "image_size": 24, "patch_size": 8, **vision}
    texts = {**STACK, "hidden_size": 24, "vocab_size": len(tokenizer) + 7, "max_position_embeddings": 16}
    texts |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "projection_size": 32}
    if kind == "SiglipTextModel":
        config: Any = transformers.SiglipTextConfig(**texts)
    elif kind == "SiglipVisionModel":
        config = transformers.SiglipVisionConfig(**images)
    else:
        config = transformers.SiglipConfig(text_config=texts, vision_config=images, num_labels=3)
    model = randomise(getattr(transformers, kind)(config))
    processor = transformers.SiglipImageProcessor(size={"height": 24, "width": 24})
    save_reference(model, folder, tokenizer, processor)
    return model


def inputs(folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    texts = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    return {**processor(PICTURES, return_tensors="pt"), "input_ids": texts["input_ids"]}


def images() -> list[pm.Image]:
    return [pm.Image(picture) for picture in PICTURES]


def test_embeddings_and_logits_equal_the_reference(tmp_path: Path) -> None:
    reference = make(tmp_path / "theirs", "SiglipModel")
    model = pm.load(tmp_path / "theirs")
    with torch.inference_mode():
        expected = reference(**inputs(tmp_path / "theirs"))
    pictures, texts = model.embed(images()), model.embed(TEXTS)
    assert_close(pictures, expected.image_embeds)
    assert_close(texts, expected.text_embeds)
    head = model.network.head("projection")
    assert_close(float(head.scale) * pictures @ texts.T + float(head.bias), expected.logits_per_image)
    assert model.export(tmp_path / "ours") == "siglip"
    assert_same_weights(transformers.SiglipModel.from_pretrained(tmp_path / "ours"), reference)


def test_inputs_are_prepared_as_the_reference_does(tmp_path: Path) -> None:
    make(tmp_path, "SiglipModel")
    streams, expected = pm.load(tmp_path).engine.processor.streams, inputs(tmp_path)
    for picture, values in zip(images(), expected["pixel_values"], strict=True):
        assert_close(streams["image"].reader.read(picture).units[0], values, rel=1e-3)
    for text, ids in zip(TEXTS, expected["input_ids"].tolist(), strict=True):
        assert streams["text"].reader.read(pm.Text(text)).units[0].tolist() == ids


def test_texts_of_a_sentencepiece_model_are_tokenised_as_the_reference_does(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    make(tmp_path / "full", "SiglipTextModel")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "dogs and cats run over the green grass", "jump, quick fox!"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=36,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=16)
    folder = tmp_path / "folder"
    theirs.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tmp_path / "full" / name).read_bytes())
    reader = pm.load(folder).engine.processor.streams["text"].reader
    for text in (*TEXTS, "A Red, red   Dog's!", "the\tfox (quick) ", "on-grass"):
        expected = theirs(text, padding="max_length", truncation=True, max_length=16)["input_ids"]
        assert reader.read(pm.Text(text)).units[0].tolist() == expected, text


@pytest.mark.parametrize("has_head", [True, False])
def test_a_vision_tower_alone(tmp_path: Path, has_head: bool) -> None:
    reference = make(tmp_path / "theirs", "SiglipVisionModel", vision_use_head=has_head)
    model = pm.load(tmp_path / "theirs")
    with torch.inference_mode():
        expected = reference(inputs(tmp_path / "theirs")["pixel_values"])
    found = model.features(images())
    assert_close(np.concatenate([part.features for part in found]), expected.last_hidden_state)
    pooled = np.concatenate([part.pooled for part in found])
    assert_close(pooled, expected.pooler_output if has_head else expected.last_hidden_state.mean(dim=1))
    assert model.export(tmp_path / "ours", "siglip") == "siglip"
    assert_same_weights(transformers.SiglipVisionModel.from_pretrained(tmp_path / "ours"), reference)


def test_a_text_tower_alone(tmp_path: Path) -> None:
    reference = make(tmp_path / "theirs", "SiglipTextModel")
    model = pm.load(tmp_path / "theirs")
    with torch.inference_mode():
        expected = reference(inputs(tmp_path / "theirs")["input_ids"])
    found = model.features(TEXTS)
    assert_close(np.concatenate([part.features for part in found]), expected.last_hidden_state)
    assert_close(np.concatenate([part.pooled for part in found]), expected.pooler_output)
    assert model.export(tmp_path / "ours") == "siglip"
    assert_same_weights(transformers.SiglipTextModel.from_pretrained(tmp_path / "ours"), reference)


def test_classes_equal_the_reference(tmp_path: Path) -> None:
    reference = make(tmp_path / "theirs", "SiglipForImageClassification")
    model = pm.load(tmp_path / "theirs")
    _, chances = model.classify([pm.Sample(str(i), views={"image": part}) for i, part in enumerate(images())])
    with torch.inference_mode():
        assert_close(chances, reference(inputs(tmp_path / "theirs")["pixel_values"]).logits.softmax(1))
    assert model.export(tmp_path / "ours") == "siglip"
    assert_same_weights(transformers.SiglipForImageClassification.from_pretrained(tmp_path / "ours"), reference)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path, "SiglipVisionModel")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["head.attention.in_proj_weight"] = tensors["head.attention.in_proj_weight"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"head.attention.in_proj_weight: found shape \(95, 32\), expected axis 0"
    ):
        pm.load(tmp_path)
    del tensors["head.attention.in_proj_weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"3 tensor\(s\) missing: head.attention.in_proj_weight"):
        pm.load(tmp_path)


def test_padding_on_the_left_is_refused() -> None:
    configs = HubConfigs({"model_type": "siglip"}, tokenizer={"padding_side": "left"})
    with pytest.raises(ConfigError, match="found padding_side: 'left', expected 'right'"):
        SIGLIP.model(configs)


@pytest.mark.parametrize("name", list(SIGLIP.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    # Published as 203M, 652M, 878M (SigLIP; base, large, so400m) and 375M, 882M, 1.1B, 1.9B (SigLIP 2).
    assert_published_size(name, lambda config: transformers.SiglipModel(transformers.SiglipConfig(**config)))
