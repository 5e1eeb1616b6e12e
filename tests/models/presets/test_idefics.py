"""Idefics (Flamingo's layout) against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.inference.engine import Generation
from polymodal.inference.sampling import Sampling
from polymodal.models.presets import find_size
from polymodal.models.weights import HubConfigs

from .languages import byte_tokenizer
from .pairs import PICTURES
from .prompts import asked, assert_same_logits
from .reference import assert_missing_is_named, assert_published_size, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

CASES: dict[str, dict[str, Any]] = {
    "resampler": {"use_resampler": True, "qk_layer_norms": True, "alpha_type": "vector", "cross_layer_interval": 2},
    "features": {"use_resampler": False},
}
FAKE, IMAGE = "<fake_token_around_image>", "<image>"
PROMPTS: list[list[Any]] = [
    [PICTURES[0], "What is in it?"],
    ["Before.", PICTURES[1], PICTURES[2], "And here?", PICTURES[0], "Which is the largest of them all?"],
    ["No picture at all"],
]


def make(folder: Path, changes: dict[str, Any]) -> Path:
    words = byte_tokenizer(None)
    base = len(words)
    words.add_special_tokens({"additional_special_tokens": [FAKE, IMAGE]})
    assert words.convert_tokens_to_ids(IMAGE) == base + 1
    sizes = {"num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.IdeficsConfig(
        **sizes, **changes, vocab_size=base, additional_vocab_size=2, hidden_size=32, num_hidden_layers=4,
        max_position_embeddings=256, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        vision_config={**sizes, "embed_dim": 24, "num_hidden_layers": 2, "image_size": 24, "patch_size": 8},
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2,
            "resampler_head_dim": 10, "qk_layer_norms_perceiver": changes["use_resampler"],
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomise(transformers.IdeficsForVisionText2Text(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.add_(0.7)
            elif parameter.ndim == 2 and "embed" not in name and "vision" not in name:
                parameter.mul_(2.5)
    model.generation_config.pad_token_id = words.pad_token_id
    save_reference(model, folder, words)
    transformers.IdeficsImageProcessor(image_size=24).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(CASES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make(tmp_path_factory.mktemp(request.param), CASES[request.param])
    return folder, transformers.IdeficsForVisionText2Text.from_pretrained(folder).eval()


def inputs_of(folder: Path, prompt: list[Any]) -> Any:
    images = transformers.IdeficsImageProcessor.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.IdeficsProcessor(images, words)(text=[prompt], return_tensors="pt", add_special_tokens=False)


def test_logits_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, reference = made
    model = pm.load(folder)
    start = [transformers.AutoTokenizer.from_pretrained(folder).bos_token_id]
    for prompt in PROMPTS:
        inputs = inputs_of(folder, prompt)
        plan = model.engine.processor.plan(asked(prompt), prompt=True)
        assert start + plan.ids == inputs.input_ids[0].tolist(), "the reference's processor adds the start token"
        rest = {name: value[:, 1:] for name, value in inputs.items() if name != "pixel_values"}
        assert_same_logits(model, plan, reference, {"pixel_values": inputs.pixel_values, **rest})


def test_greedy_answers_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, reference = made
    model = pm.load(folder)
    found = model.engine.generate([asked(prompt) for prompt in PROMPTS], Sampling(max_new_tokens=32))
    for prompt, each in zip(PROMPTS, found, strict=True):
        inputs = inputs_of(folder, prompt)
        rest = {name: value[:, 1:] for name, value in inputs.items() if name != "pixel_values"}
        with torch.inference_mode():
            ids = reference.generate(pixel_values=inputs.pixel_values, **rest, max_new_tokens=32, do_sample=False)
        ids = ids[0, rest["input_ids"].shape[1] :].tolist()
        end = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
        assert each.ids == (ids[: ids.index(end)] if end in ids else ids)
    assert len({tuple(each.ids) for each in found}) == 3 and max(len(each.ids) for each in found) == 32
    record = Generation()
    for _ in range(2):
        assert list(model.engine.stream(asked(PROMPTS[1]), Sampling(max_new_tokens=32), record)) == found[1].ids
    assert record.num_reused_tokens > 10


def test_pixels_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, _ = made
    reader = pm.load(folder).engine.processor.streams["image"].reader
    expected = inputs_of(folder, PROMPTS[1]).pixel_values[0]
    for picture, theirs in zip((PICTURES[1], PICTURES[2], PICTURES[0]), expected, strict=True):
        assert np.abs(reader.read(pm.Image(picture)).units[0] - theirs.numpy()).max() < 1e-3


def test_export_reloads_there_bit_for_bit(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = made
    assert pm.load(folder).export(tmp_path / "out") == "idefics"
    again = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    inputs = inputs_of(tmp_path / "out", PROMPTS[1])
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, reference(**inputs_of(folder, PROMPTS[1])).logits)


def test_a_missing_tensor_is_named(made: tuple[Path, Any]) -> None:
    assert_missing_is_named(made[0], "model.gated_cross_attn_layers.1.alpha_dense")


def test_what_there_is_no_native_form_of_is_refused() -> None:
    architecture, size = find_size("idefics-9b")
    with pytest.raises(ConfigError, match="found 32 layers and cross_layer_interval 5, expected a multiple"):
        architecture.model(HubConfigs({**size.config, "cross_layer_interval": 5}))


@pytest.mark.parametrize("name", list(find_size("idefics-9b")[0].sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    assert_published_size(
        name, lambda config: transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**config)), rows=32_002
    )
