"""BLIP-2's first stage, contrast and matching, against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.presets import find_architecture
from polymodal.models.presets.blip2_retrieval import BLIP2_RETRIEVAL
from polymodal.models.weights import HubConfigs

from .bert_tokenizer import bert_tokenizer
from .reference import (
    assert_close,
    assert_missing_is_named,
    assert_published_size,
    assert_same_weights,
    randomise,
    save_reference,
)
from .test_blip2 import PICTURES, QFORMER, QUERIES, VISION

transformers = pytest.importorskip("transformers")

TEXTS = ["a red dog", "what is it on the grass?", "cats"]
SAMPLES = [
    pm.Sample(str(i), views={"text": pm.Text(text), "image": pm.Image(picture)})
    for i, (text, picture) in enumerate(zip(TEXTS, PICTURES, strict=True))
]


def make(folder: Path) -> tuple[Path, Any, Any]:
    """A folder with a random reference, the reference, and its inputs for the samples."""
    words = bert_tokenizer(64)
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**VISION),
        qformer_config=transformers.Blip2QFormerConfig(
            **{**QFORMER, "vocab_size": len(words), "use_qformer_text_input": True}
        ),
        num_query_tokens=QUERIES,
        image_text_hidden_size=20,
    )
    torch.manual_seed(0)
    model = randomise(transformers.Blip2ForImageTextRetrieval(config))
    with torch.no_grad():
        model.query_tokens.mul_(10.0)
        for embedding in (model.embeddings.word_embeddings, model.embeddings.position_embeddings):
            embedding.weight.mul_(10.0)
        for parameter in model.qformer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
        model.itm_head.weight.mul_(5.0)
    images = transformers.BlipImageProcessor(size={"height": 24, "width": 24})
    save_reference(model, folder, images, words)
    inputs = {**words(TEXTS, padding=True, return_tensors="pt"), **images(PICTURES, return_tensors="pt")}
    inputs.pop("token_type_ids", None)
    return folder, model, inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    return make(tmp_path_factory.mktemp("blip2"))


def test_matches_equal_the_reference(made: tuple[Path, Any, Any]) -> None:
    """Queries and words see each other, and the logits of the queries are averaged."""
    folder, reference, inputs = made
    model = pm.load(folder)
    with torch.inference_mode():
        logits = reference(**inputs, use_image_text_matching_head=True).logits_per_image
    assert_close(model.engine.match_logits(SAMPLES), logits[:, 1] - logits[:, 0])
    assert_close(model.match(SAMPLES), logits.softmax(1)[:, 1])
    assert np.ptp(model.match(SAMPLES)) > 0.05, "texts and pictures must make a difference"


def test_similarities_equal_the_reference(made: tuple[Path, Any, Any]) -> None:
    """Queries and words stand apart, and the best query of a picture counts."""
    folder, reference, inputs = made
    model = pm.load(folder)
    with torch.inference_mode():
        theirs = reference(**inputs)
    vectors, texts = model.embed([pm.Image(p) for p in PICTURES]), model.embed(TEXTS)
    assert vectors.shape == (3, QUERIES, 20) and texts.shape == (3, 20)
    assert_close(vectors, theirs.image_embeds)
    assert_close(texts, theirs.text_embeds)
    assert_close((vectors @ texts.T).max(1), theirs.logits_per_image)
    with pytest.raises(ConfigError, match=r"found 5 vectors for each image .* embed each modality in a call of its"):
        model.embed([pm.Image(PICTURES[0]), "a red dog"])


def test_the_export_reads_back_bit_for_bit(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, reference, _ = made
    model = pm.load(folder)
    assert model.export(tmp_path / "ours") == "blip-2-retrieval"
    assert_same_weights(transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "ours"), reference)
    again = pm.load(tmp_path / "ours")
    np.testing.assert_array_equal(again.match(SAMPLES), model.match(SAMPLES))


def test_a_missing_tensor_is_named(made: tuple[Path, Any, Any]) -> None:
    assert_missing_is_named(made[0], "qformer.encoder.layer.1.intermediate.dense.bias")


def test_what_is_not_built_is_refused() -> None:
    configs = HubConfigs({"model_type": "blip-2", "architectures": ["Blip2ForImageTextRetrieval"]})
    assert find_architecture(configs) is BLIP2_RETRIEVAL
    with pytest.raises(ConfigError, match="found use_qformer_text_input: False, expected True"):
        BLIP2_RETRIEVAL.model(configs)


@pytest.mark.parametrize("name", list(BLIP2_RETRIEVAL.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    assert_published_size(
        name, lambda config: transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(**config)), rows=30523
    )
