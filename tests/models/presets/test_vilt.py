"""ViLT against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.compose import to_device
from polymodal.models.presets.vilt import VILT
from polymodal.models.weights import HubConfigs

from .bert_tokenizer import bert_tokenizer
from .pairs import TEXTS, pairs_of
from .reference import assert_close, assert_published_size, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

PICTURES, SAMPLES = pairs_of((40, 40), (30, 64), (90, 40))


def make(folder: Path, kind: str, **options: Any) -> tuple[Any, Any]:
    """A random reference and what its processor makes of the samples."""
    tokenizer = bert_tokenizer(12)
    config = transformers.ViltConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=12,
        **options,
    )
    torch.manual_seed(0)
    model = randomise(getattr(transformers, kind)(config))
    images = transformers.ViltImageProcessor(size={"shortest_edge": 24}, size_divisor=8)
    processor = transformers.ViltProcessor(images, tokenizer)
    save_reference(model, folder, processor)
    return model, processor


def inputs(processor: Any) -> Any:
    return processor(PICTURES, TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")


def merged(model: pm.Model, samples: list[pm.Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Word states, which are valid, and the pooled state, one sample per row."""
    from polymodal.models.compose.joint import JointRun

    batch = to_device(model.engine.processor.batch(samples), "cpu")
    with torch.inference_mode():
        run = JointRun(model.network, batch, {n: model.network.encode(n, s) for n, s in batch.streams.items()})
        states = run.states(*run.lay_out(run.features))
    return states.x["text"], states.is_valid["text"], states.pooled_SW


def test_states_equal_the_reference(tmp_path: Path) -> None:
    reference, processor = make(tmp_path / "theirs", "ViltModel")
    model = pm.load(tmp_path / "theirs")
    states, is_valid, pooled = merged(model, SAMPLES)
    with torch.inference_mode():
        expected = reference(**inputs(processor))
    words = expected.last_hidden_state[:, : states.shape[1]]
    assert_close(states[is_valid], words[is_valid])
    assert_close(pooled, expected.pooler_output)
    assert model.export(tmp_path / "ours") == "vilt"
    assert_same_weights(transformers.ViltModel.from_pretrained(tmp_path / "ours"), reference)
    assert pm.load(tmp_path / "ours").recipe.model.to_data()["backbone"] == model.recipe.model.to_data()["backbone"]


def test_one_sample_is_the_same_alone(tmp_path: Path) -> None:
    make(tmp_path, "ViltModel")
    model = pm.load(tmp_path)
    together = merged(model, SAMPLES)[2]
    alone = torch.cat([merged(model, [sample])[2] for sample in SAMPLES])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_masked_words_equal_the_reference(tmp_path: Path) -> None:
    reference, processor = make(tmp_path / "theirs", "ViltForMaskedLM")
    model = pm.load(tmp_path / "theirs")
    states, is_valid, _ = merged(model, SAMPLES)
    with torch.inference_mode():
        expected = reference(**inputs(processor)).logits
        found = model.network.heads["words"](states)
    assert_close(found[is_valid], expected[is_valid])
    assert model.export(tmp_path / "ours") == "vilt"
    assert_same_weights(transformers.ViltForMaskedLM.from_pretrained(tmp_path / "ours"), reference)


def test_hidden_words_are_filled_as_the_reference_does(tmp_path: Path) -> None:
    reference, processor = make(tmp_path, "ViltForMaskedLM")
    hidden = ["red", "it", "cats"]
    given = processor(PICTURES, TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt",
                      return_offsets_mapping=True)  # fmt: skip
    spans = [(text.index(word), text.index(word) + len(word)) for text, word in zip(TEXTS, hidden, strict=True)]
    offsets = given.pop("offset_mapping")
    wanted = torch.tensor(spans)[:, None]
    is_hidden = (offsets[..., 0] < wanted[..., 1]) & (offsets[..., 1] > wanted[..., 0])
    assert is_hidden.any(1).all()
    given["input_ids"][is_hidden] = processor.tokenizer.mask_token_id
    with torch.inference_mode():
        likeliest = reference(**given).logits.argmax(-1)
    expected = [processor.tokenizer.decode(row[own]) for row, own in zip(likeliest, is_hidden, strict=True)]
    assert pm.load(tmp_path).fill(SAMPLES, spans) == expected


def test_answers_equal_the_reference(tmp_path: Path) -> None:
    reference, processor = make(tmp_path / "theirs", "ViltForQuestionAnswering", num_labels=5)
    model = pm.load(tmp_path / "theirs")
    labels, chances = model.classify(SAMPLES)
    with torch.inference_mode():
        expected = reference(**inputs(processor)).logits.softmax(1)
    assert_close(chances, expected)
    assert labels == [f"LABEL_{int(row.argmax())}" for row in expected]
    assert model.export(tmp_path / "ours") == "vilt"
    assert_same_weights(transformers.ViltForQuestionAnswering.from_pretrained(tmp_path / "ours"), reference)


def test_matches_equal_the_reference(tmp_path: Path) -> None:
    reference, processor = make(tmp_path / "theirs", "ViltForImageAndTextRetrieval")
    model = pm.load(tmp_path / "theirs")
    with torch.inference_mode():
        expected = reference(**inputs(processor)).logits[:, 0]
    assert_close(model.engine.match_logits(SAMPLES), expected)
    assert_close(model.match(SAMPLES), expected.sigmoid())
    assert model.export(tmp_path / "ours") == "vilt"
    assert_same_weights(transformers.ViltForImageAndTextRetrieval.from_pretrained(tmp_path / "ours"), reference)


def test_pictures_are_prepared_as_the_reference_does(tmp_path: Path) -> None:
    _, processor = make(tmp_path, "ViltModel")
    reader = pm.load(tmp_path).engine.processor.streams["image"].reader
    for picture in PICTURES:
        expected = processor.image_processor([picture], return_tensors="pt")["pixel_values"][0]
        rows, columns = expected.shape[1] // 8, expected.shape[2] // 8
        patches = expected.view(3, rows, 8, columns, 8).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
        unit = reader.read(pm.Image(picture)).units[0]
        assert reader.measure(pm.Image(picture)) == (rows * columns,)
        assert_close(unit[:, :-2], patches, rel=1e-3)


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path, "ViltModel")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stray.weight"] = tensors.pop("pooler.dense.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) missing: pooler.dense.bias"):
        pm.load(tmp_path)
    save_file({**tensors, "pooler.dense.bias": torch.zeros(32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) unknown to vilt: stray.weight"):
        pm.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modality_type_vocab_size": 3}, "found modality_type_vocab_size: 3, expected 2"),
        ({"max_image_length": 200}, "found max_image_length: 200, expected -1"),
        ({"architectures": ["ViltForImagesAndTextClassification"]}, "found the class 'ViltForImagesAndText"),
        ({"image_size": 100}, "found image_size 100, expected a multiple of patch_size 32"),
    ],
)
def test_what_is_not_built_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VILT.model(HubConfigs({"model_type": "vilt", **config}))


@pytest.mark.parametrize("name", list(VILT.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    assert_published_size(name, rows=30522)
