"""The number format of published weights: kept, mapped and written back as stored; float32 where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from models.presets.languages import byte_tokenizer, save_language
from models.presets.reference import assert_close, assert_same_weights, randomise, save_reference
from safetensors.torch import load_file

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.inference.quantised import num_bytes
from polymodal.models.layers.attention import Attention

transformers = pytest.importorskip("transformers")

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
TEXT = "a red circle, and 7 of them"


def language(folder: Path, dtype: torch.dtype) -> Any:
    """A Llama whose weights lie in ``dtype``, as the reference library saves it, and its float32 twin."""
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    save_language(model, folder)
    model.to(dtype).save_pretrained(folder)
    # Not the model itself: its rotary table has been rounded too.
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def their_logits(model: Any) -> np.ndarray:
    ids = byte_tokenizer()(TEXT, return_tensors="pt")
    with torch.no_grad():
        return np.asarray(model(**ids).logits[0].float().numpy())


def our_logits(model: pm.Model) -> np.ndarray:
    return model.logits([pm.Text(TEXT)])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("name", FORMATS)
def test_the_stored_format_is_kept_and_computes_as_the_reference_does(name: str, tmp_path: Path) -> None:
    exact = their_logits(language(tmp_path, FORMATS[name]))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reference.dtype == FORMATS[name]
    model = pm.load(tmp_path)
    assert {parameter.dtype for parameter in model.network.parameters()} == {FORMATS[name]}
    ours, theirs = our_logits(model), their_logits(reference)
    # Rounding moves both; ours may stand no farther from the exact logits than the reference's, nor from them.
    off = distance(theirs, exact)
    assert 0 < off < 0.05
    assert distance(ours, exact) < 1.5 * off
    assert distance(ours, theirs) < 2 * off


@pytest.mark.parametrize("name", FORMATS)
def test_as_float32_it_is_the_reference_in_float32(name: str, tmp_path: Path) -> None:
    exact = language(tmp_path, FORMATS[name])
    model = pm.load(tmp_path, weights="fp32")
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    stored = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.network.head("next_token").proj.weight, stored.float())
    assert_close(our_logits(model), their_logits(exact))


def test_a_float32_checkpoint_stays_float32(tmp_path: Path) -> None:
    language(tmp_path, torch.float32)
    assert {parameter.dtype for parameter in pm.load(tmp_path).network.parameters()} == {torch.float32}


def test_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """What is mapped from the file lies within its mapping, which the system lists."""
    language(tmp_path, torch.bfloat16)
    model = pm.load(tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list mappings")
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in maps.read_text(encoding="utf-8").splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    for name, parameter in model.network.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in spans), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_export_is_stored_as_the_checkpoint_was(dtype: torch.dtype, tmp_path: Path) -> None:
    language(tmp_path / "in", dtype)
    pm.load(tmp_path / "in").export(tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype and torch.equal(after[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    auto = transformers.AutoModelForCausalLM
    assert_same_weights(auto.from_pretrained(tmp_path / "out"), auto.from_pretrained(tmp_path / "in"))


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_fewer_bits_are_made_of_the_stored_format(weights: str, tmp_path: Path) -> None:
    if weights != "bf16":
        pytest.importorskip("torchao")
    exact = their_logits(language(tmp_path, torch.bfloat16))
    plain, small = pm.load(tmp_path), pm.load(tmp_path, weights=weights)
    assert num_bytes(small.network) <= num_bytes(plain.network)
    assert distance(our_logits(small), exact) < {"bf16": 0.05, "int8": 0.08, "int4": 0.5}[weights]


def test_pictures_are_read_in_the_weights_format(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    model = randomise(transformers.ViTModel(config, add_pooling_layer=False))
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    save_reference(model.to(torch.bfloat16), tmp_path, processor)
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    pixels = processor(picture, return_tensors="pt").pixel_values.to(torch.bfloat16)
    with torch.no_grad():
        theirs = model(pixels).last_hidden_state[0].float().numpy()
        exact = model.float()(pixels.float()).last_hidden_state[0].numpy()
    ours = pm.load(tmp_path).features([pm.Image(tmp_path / "picture.png")])[0].features[0]
    ours = ours if len(ours) == len(exact) else np.concatenate([exact[:1], ours])
    assert distance(ours, exact) < max(0.02, 1.5 * distance(theirs, exact))


def test_an_adapter_acts_on_half_precision(tmp_path: Path) -> None:
    from polymodal.models.adapters import ADAPTERS, apply_adapter

    language(tmp_path, torch.bfloat16)
    model = pm.load(tmp_path)
    plain = our_logits(model)
    apply_adapter(model.network, ADAPTERS.parse({"use": "lora", "rank": 2, "match": ["*.q_proj"]}))
    assert any(isinstance(module, Attention) for module in model.network.modules())
    np.testing.assert_array_equal(our_logits(model), plain)


def test_a_form_that_is_not_there(tmp_path: Path) -> None:
    language(tmp_path, torch.float32)
    with pytest.raises(ConfigError, match=r"weights: unknown form 'fp8'.*auto.*fp32.*bf16.*int8.*int4"):
        pm.load(tmp_path, weights="fp8")
