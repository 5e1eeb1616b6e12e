"""BLIP for retrieval against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.presets import find_architecture
from polymodal.models.presets.blip_retrieval import BLIP_RETRIEVAL
from polymodal.models.weights import HubConfigs

from .bert_tokenizer import bert_tokenizer
from .pairs import PICTURES, SAMPLES, TEXTS
from .reference import (
    assert_close,
    assert_missing_is_named,
    assert_published_size,
    assert_same_weights,
    randomise,
    save_reference,
)

transformers = pytest.importorskip("transformers")


def make(folder: Path) -> tuple[Path, Any, Any]:
    """A folder with a random reference whose widths differ, the reference, and its inputs for the samples."""
    tokenizer = bert_tokenizer(16)
    sizes = {"num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BlipConfig(
        text_config={
            **sizes, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 16, "bos_token_id": 2, "sep_token_id": 3,
        },
        vision_config={**sizes, "hidden_size": 24, "num_hidden_layers": 3, "image_size": 24, "patch_size": 8},
        image_text_hidden_size=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomise(transformers.BlipForImageTextRetrieval(config))
    images = transformers.BlipImageProcessor(size={"height": 24, "width": 24})
    processor = transformers.BlipProcessor(images, tokenizer)
    save_reference(model, folder, processor)
    inputs = processor(PICTURES, TEXTS, padding=True, return_tensors="pt")
    return folder, model, inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    return make(tmp_path_factory.mktemp("blip"))


def test_matches_equal_the_reference(made: tuple[Path, Any, Any]) -> None:
    folder, reference, inputs = made
    model = pm.load(folder)
    with torch.inference_mode():
        scores = reference(**inputs).itm_score
    assert_close(model.engine.match_logits(SAMPLES), scores[:, 1] - scores[:, 0])
    assert_close(model.match(SAMPLES), scores.softmax(1)[:, 1])


def test_vectors_equal_the_reference(made: tuple[Path, Any, Any]) -> None:
    folder, reference, inputs = made
    model = pm.load(folder)
    with torch.inference_mode():
        similarity = reference(**inputs, use_itm_head=False).itm_score
    ours = model.embed([pm.Image(p) for p in PICTURES]) @ model.embed(TEXTS).T
    assert_close(ours, similarity)
    assert_close(model.embed([SAMPLES[1].views["text"]]), model.embed(TEXTS)[1:2])


def test_the_export_reads_back_bit_for_bit(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, reference, _ = made
    model = pm.load(folder)
    assert model.export(tmp_path / "ours") == "blip-retrieval"
    assert_same_weights(transformers.BlipForImageTextRetrieval.from_pretrained(tmp_path / "ours"), reference)
    again = pm.load(tmp_path / "ours")
    np.testing.assert_array_equal(again.match(SAMPLES), model.match(SAMPLES))


def test_a_missing_tensor_is_named(made: tuple[Path, Any, Any]) -> None:
    assert_missing_is_named(made[0], "vision_model.encoder.layers.1.self_attn.qkv.bias", count=3)


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="found is_decoder: False, expected True"):
        BLIP_RETRIEVAL.model(HubConfigs({"model_type": "blip", "text_config": {"is_decoder": False}}))
    configs = HubConfigs({"model_type": "blip", "architectures": ["BlipForImageTextRetrieval"]})
    assert find_architecture(configs) is BLIP_RETRIEVAL


@pytest.mark.parametrize("name", list(BLIP_RETRIEVAL.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    assert_published_size(
        name, lambda config: transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**config)), rows=30524
    )
