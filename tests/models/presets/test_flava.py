"""FLAVA against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.passes import TokenPass
from polymodal.models.compose import to_device
from polymodal.models.compose.joint import JointRun
from polymodal.models.compose.masking import mask_blocks
from polymodal.models.presets.flava import FLAVA
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


def make(folder: Path, kind: str) -> tuple[Any, Any]:
    tokenizer = bert_tokenizer(16)
    sizes = {"num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.FlavaConfig(
        hidden_size=32,
        text_config={
            **sizes, "hidden_size": 24, "vocab_size": len(tokenizer), "max_position_embeddings": 16
        },
        image_config={**sizes, "hidden_size": 40, "image_size": 24, "patch_size": 8, "vocab_size": 12},
        multimodal_config={**sizes, "hidden_size": 32},
        image_codebook_config={"hidden_size": 4, "vocab_size": 12},
        projection_dim=20,
    )  # fmt: skip
    if kind == "FlavaForPreTraining":
        # The library gives every masked head the width of its own encoder, so that widths must agree there.
        for part in (config.text_config, config.image_config):
            part.hidden_size = 32
    torch.manual_seed(0)
    model = randomise(getattr(transformers, kind)(config))
    images = transformers.FlavaImageProcessor(
        size={"height": 24, "width": 24}, crop_size={"height": 24, "width": 24},
        codebook_size={"height": 24, "width": 24}, codebook_crop_size={"height": 24, "width": 24},
    )  # fmt: skip
    processor = transformers.FlavaProcessor(images, tokenizer)
    save_reference(model, folder, processor)
    inputs = images(PICTURES, return_tensors="pt") | tokenizer(TEXTS, padding=True, return_tensors="pt")
    return model, inputs


def run_of(model: pm.Model) -> tuple[Any, JointRun]:
    batch = to_device(model.engine.processor.batch(SAMPLES), "cpu")
    streams = {name: stream for name, stream in batch.streams.items() if name != "codebook"}
    return batch, JointRun(model.network, batch, {n: model.network.encode(n, s) for n, s in streams.items()})


def test_states_poolers_and_vectors_equal_the_reference(tmp_path: Path) -> None:
    reference, inputs = make(tmp_path / "theirs", "FlavaModel")
    model = pm.load(tmp_path / "theirs")
    batch, run = run_of(model)
    with torch.no_grad():
        states = run.states(*run.lay_out(run.features))
        poolers = model.network(batch, ("pool",)).pooled
        expected = reference(**inputs)
    places = 9 + 1
    assert_close(states.x["image"], expected.multimodal_embeddings[:, 1 : 1 + places])
    is_valid = states.is_valid["text"]
    assert_close(states.x["text"][is_valid], expected.multimodal_embeddings[:, 1 + places :][is_valid])
    assert_close(states.pooled_SW, expected.multimodal_embeddings[:, 0])
    assert_close(poolers["image_pooler"], expected.image_output.pooler_output)
    assert_close(poolers["text_pooler"], expected.text_output.pooler_output)
    assert_close(poolers["joint_pooler"], expected.multimodal_output.pooler_output)
    with torch.no_grad():
        image = reference.image_projection(expected.image_embeddings[:, 0])
        text = reference.text_projection(expected.text_embeddings[:, 0])
    assert_close(model.embed([pm.Image(picture) for picture in PICTURES]), torch.nn.functional.normalize(image, dim=1))
    assert_close(model.embed(TEXTS), torch.nn.functional.normalize(text, dim=1))
    assert model.export(tmp_path / "ours") == "flava"
    assert_same_weights(transformers.FlavaModel.from_pretrained(tmp_path / "ours"), reference)


def test_pretraining_heads_equal_the_reference(tmp_path: Path) -> None:
    reference, inputs = make(tmp_path / "theirs", "FlavaForPreTraining")
    model = pm.load(tmp_path / "theirs")
    batch, run = run_of(model)
    heads = model.network.heads
    torch.manual_seed(1)
    is_masked = mask_blocks([(3, 3)] * 3, 0.4, 9, torch.device("cpu"))
    vision = model.network.streams["image"].encoder
    with torch.no_grad():
        run.features["image"] = vision.encode_masked(batch.streams["image"].values, torch.ones(3), is_masked)
        states = run.states(*run.lay_out(run.features))
        asked = {**inputs, "input_ids_masked": inputs["input_ids"], "bool_masked_pos": is_masked, "return_loss": False}
        expected = reference(**asked)
        alone = {key: asked[key] for key in ("pixel_values", "bool_masked_pos", "return_loss")}
        unimodal = reference(**alone)
        words = {key: asked[key] for key in ("input_ids", "input_ids_masked", "attention_mask", "return_loss")}
        text = reference(**words)
    is_valid = states.is_valid["text"]
    assert_close(heads["mmm_image"](states.x["image"][:, 1:]), expected.mmm_image_logits)
    assert_close(heads["mmm_text"](states.x["text"])[is_valid], expected.mmm_text_logits[is_valid])
    assert_close(heads["match"].scores(states.pooled_SW), expected.itm_logits)
    assert_close(heads["mim"](vision.normed(run.features["image"])), unimodal.mim_logits)
    text_encoder = model.network.streams["text"].encoder
    assert_close(heads["mlm"](text_encoder.normed(run.features["text"]))[is_valid], text.mlm_logits[is_valid])
    scaled = model.embed([pm.Image(p) for p in PICTURES]) @ model.embed(TEXTS).T
    assert_close(scaled * float(heads["space"].scale), expected.contrastive_logits_per_image)
    assert model.export(tmp_path / "ours") == "flava"
    assert_same_weights(transformers.FlavaForPreTraining.from_pretrained(tmp_path / "ours"), reference)


def test_codes_equal_the_reference(tmp_path: Path) -> None:
    reference, _ = make(tmp_path, "FlavaForPreTraining")
    model = pm.load(tmp_path)
    batch, _ = run_of(model)
    values = batch.streams["codebook"].values
    with torch.no_grad():
        scores = reference.image_codebook(values).flatten(2).transpose(1, 2)
        found = model.network.encode("codebook", batch.streams["codebook"]).x_UND
    assert_close(found, scores)
    needed = TokenPass("masked", "mmm_image", (("image", 0.4), ("text", 0.15)))
    torch.manual_seed(0)
    outputs = model.network(batch, (needed,)).tokens[needed]
    assert outputs.predictions.shape == (3 * 4, 12) and outputs.targets.max() < 12


def test_pictures_are_prepared_as_the_reference_does(tmp_path: Path) -> None:
    make(tmp_path, "FlavaForPreTraining")
    streams = pm.load(tmp_path).engine.processor.streams
    processor = transformers.FlavaImageProcessor.from_pretrained(tmp_path)
    expected = processor([PICTURES[1]], return_codebook_pixels=True, return_tensors="pt")
    picture = pm.Image(PICTURES[1])
    assert_close(streams["image"].reader.read(picture).units[0], expected["pixel_values"][0], rel=1e-3)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make(tmp_path, "FlavaModel")
    assert_missing_is_named(tmp_path, "multimodal_model.cls_token")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"multimodal_config": {"use_cls_token": False}}, "found use_cls_token: False, expected True"),
        ({"image_config": {"vocab_size": 5}}, "found 8192 codes and image heads for 5, expected equal numbers"),
        ({"init_codebook": False}, "found init_codebook: False, expected True"),
    ],
)
def test_what_is_not_built_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FLAVA.model(HubConfigs({"model_type": "flava", **config}))


@pytest.mark.parametrize("name", list(FLAVA.sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    assert_published_size(name, rows=30522)
