"""Perceiver IO against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.samples import Sample

from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

SMALL = {
    "num_latents": 6, "d_latents": 32, "d_model": 16, "num_blocks": 2, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4, "num_cross_attention_heads": 2, "max_position_embeddings": 24, "num_labels": 3,
}  # fmt: skip
IMAGES = ("Learned", "Fourier", "ConvProcessing")


def saved(folder: Path, kind: str, side: int = 16, **changes: Any) -> Path:
    from transformers.models.perceiver.image_processing_pil_perceiver import PerceiverImageProcessorPil

    torch.manual_seed(0)
    config = transformers.PerceiverConfig(**{**SMALL, "image_size": side, **changes})
    model = randomise(getattr(transformers, kind)(config))
    square, crop = {"height": side, "width": side}, {"height": side + 4, "width": side + 4}
    return save_reference(model, folder, PerceiverImageProcessorPil(size=square, crop_size=crop))


@pytest.mark.parametrize("kind", IMAGES)
def test_images_equal_the_reference(tmp_path: Path, kind: str) -> None:
    from transformers.models.perceiver.image_processing_pil_perceiver import PerceiverImageProcessorPil

    name = f"PerceiverForImageClassification{kind}"
    # Where keys and values have the width of the pixels' features, one head reads: 261 and 322 are divided by few.
    heads = {"num_cross_attention_heads": 1}
    folder = saved(tmp_path / "a", name, cross_attention_widening_factor=2, self_attention_widening_factor=3, **heads)
    reference = getattr(transformers, name).from_pretrained(folder)
    model = pm.load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 53, 3), dtype=np.uint8)
    values = PerceiverImageProcessorPil.from_pretrained(folder)(pixels, return_tensors="pt")["pixel_values"]
    found = model.engine.processor.streams["image"].reader.read(pm.Image(pixels)).units[0]
    assert_close(found, values[0], rel=1e-3)
    theirs = reference(values).logits
    features = model.network.streams["image"].encoder(values, torch.ones(1, dtype=torch.int64))
    latents = model.network.backbone({"image": features.x_UND}, {"image": features.is_valid_UN})
    assert_close(latents, reference.perceiver(values).last_hidden_state)
    assert_close(model.network.heads["class"](latents), theirs)
    labels, chances = model.classify([Sample("a", views={"image": pm.Image(pixels)})])
    assert_close(chances, theirs.softmax(1), rel=1e-3)
    assert labels == [f"LABEL_{int(theirs.argmax())}"]
    assert model.export(tmp_path / "b") == "perceiver"
    assert_same_weights(getattr(transformers, name).from_pretrained(tmp_path / "b"), reference)


def test_masked_bytes_equal_the_reference(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "PerceiverForMaskedLM", qk_channels=8, v_channels=32)
    reference = transformers.PerceiverForMaskedLM.from_pretrained(folder)
    model = pm.load(folder)
    text = "a caf\u00e9"
    tokenizer = transformers.PerceiverTokenizer()
    expected = tokenizer([text, "longer than that"], padding="max_length", max_length=24, return_tensors="pt")
    ids = torch.from_numpy(model.engine.processor.streams["text"].reader.read(pm.Text(text)).units[0])
    assert ids.tolist() == expected["input_ids"][0, : len(ids)].tolist()
    theirs = reference(**expected).logits
    lengths = expected["attention_mask"].sum(1)
    features = model.network.streams["text"].encoder(expected["input_ids"][:, : lengths.max()], lengths)
    latents = model.network.backbone({"text": features.x_UND}, {"text": features.is_valid_UN})
    logits = model.network.heads["query_token"](latents)
    assert_close(logits, theirs)
    assert model.export(tmp_path / "b") == "perceiver"
    assert_same_weights(transformers.PerceiverForMaskedLM.from_pretrained(tmp_path / "b"), reference)


def test_what_is_not_built_and_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found the class PerceiverForSequenceClassification, expected one of"):
        pm.load(saved(tmp_path / "a", "PerceiverForSequenceClassification"))
    assert_missing_is_named(
        saved(tmp_path / "b", "PerceiverForMaskedLM"), "perceiver.encoder.self_attends.1.mlp.dense2.bias"
    )
