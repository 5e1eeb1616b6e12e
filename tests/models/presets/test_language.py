"""Llama, Mistral, Qwen, GPT-2 and OPT against the reference library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.core.parts import Text
from polymodal.core.samples import Message, Sample
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import MultimodalModel
from polymodal.models.presets import ARCHITECTURES
from polymodal.models.presets.language_table import LANGUAGES, find_language
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .languages import ROWS, byte_tokenizer, save_language
from .reference import assert_close, assert_same_weights

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4],
    "long_factor": [1.0, 2.0, 3.5, 6.0],
    "original_max_position_embeddings": 60,
}
GPT2 = {"vocab_size": ROWS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
OPT = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "ffn_dim": 40,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-3": ("Llama", {**LLAMA, "rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama-linear": (
        "Llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ),
    "llama-yarn": ("Llama", {**LLAMA, "rope_parameters": YARN}),
    "qwen2-yarn": ("Qwen2", {**LLAMA, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama-yarn-whole": ("Llama", {**LLAMA, "rope_parameters": {**YARN, "truncate": False, "attention_factor": 1.3}}),
    "llama-longrope": ("Llama", {**LLAMA, "rope_parameters": LONGROPE}),
    "qwen2-window": (
        "Qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3-window": (
        "Qwen3",
        {**LLAMA, "head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 12, "head_dim": 16}),
    "qwen2": ("Qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", {**OPT, "word_embed_proj_dim": 32}),
    "opt-350m": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
}
TEXTS = ("a", "What is on the left?", "The quick brown fox jumps over the dog and", "12 34")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case as the reference library saves it."""
    found = {}
    for name, (family, options) in CASES.items():
        config = getattr(transformers, f"{family}Config")(**options)
        kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
        torch.manual_seed(0)
        found[name] = save_language(getattr(transformers, kind)(config), tmp_path_factory.mktemp(name))
    return found


def reference(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def question(text: str) -> Sample:
    return Sample(text, (Message("user", (Text(text),)),))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_states_equal_the_reference(name: str, folders: dict[str, Path]) -> None:
    ours, theirs = pm.load(folders[name]), reference(folders[name])
    ids = byte_tokenizer()(TEXTS[2], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
    states: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: states.append(out.detach()))
        for block in ours.network.decoder.transformer.blocks
    ]
    found = ours.logits([TEXTS[2]])
    for hook in hooks:
        hook.remove()
    assert found.shape == (ids.shape[1], ROWS)
    assert_close(found, expected.logits[0])
    # The reference's last state is normed already; ours comes out of the block.
    for mine, other in zip(states[:-1], expected.hidden_states[1:-1], strict=True):
        assert_close(mine[0], other[0])


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_are_the_references(name: str, folders: dict[str, Path]) -> None:
    ours, theirs = pm.load(folders[name]), reference(folders[name])
    batch = byte_tokenizer()(list(TEXTS), return_tensors="pt", padding=True)
    rows = theirs.generate(**batch, max_new_tokens=32, do_sample=False)[:, batch.input_ids.shape[1] :].tolist()
    expected = [row[: next((place for place, id in enumerate(row) if id in (257, 17)), 32)] for row in rows]
    found = ours.engine.generate([question(text) for text in TEXTS], Sampling(max_new_tokens=32))
    assert [generation.ids for generation in found] == expected
    assert [generation.finish for generation in found] == ["stop" if len(row) < 32 else "length" for row in expected]
    assert len({id for row in expected for id in row}) > 6, "an answer of one token over and over proves little"
    single = ours.chat(TEXTS[2], max_new_tokens=32)
    assert list(single.tokens) == expected[2]


@pytest.mark.parametrize("name", CASES)
def test_export_reloads_there_bit_for_bit_and_answers_the_same(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ours = pm.load(folders[name])
    family = CASES[name][0].lower()
    assert ours.export(tmp_path / "out") == family
    again, theirs = reference(tmp_path / "out"), reference(folders[name])
    assert type(again) is type(theirs)
    assert_same_weights(again, theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    assert ids.tolist() == byte_tokenizer()(TEXTS[1], return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert sorted(again.generation_config.eos_token_id) == [17, 257]
    assert ours.logits([TEXTS[1]]).tolist() == pm.load(tmp_path / "out").logits([TEXTS[1]]).tolist()


def test_weights_are_mapped_and_shared_not_copied(folders: dict[str, Path]) -> None:
    tied = pm.load(folders["gpt2"]).network
    assert tied.heads["text"].proj.weight is tied.decoder.embed_tokens.weight
    block = tied.decoder.transformer.blocks[0].attention
    assert block.q_proj.weight.untyped_storage().data_ptr() == block.k_proj.weight.untyped_storage().data_ptr()


def test_a_checkpoint_of_the_bare_body_is_read_too(folders: dict[str, Path], tmp_path: Path) -> None:
    body = transformers.GPT2Model.from_pretrained(folders["gpt2"])
    body.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert_close(pm.load(tmp_path).logits([TEXTS[1]]), pm.load(folders["gpt2"]).logits([TEXTS[1]]), rel=1e-6)


def test_missing_and_unknown_tensors_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["qwen2"] / name).read_bytes())
    tensors = load_file(folders["qwen2"] / "model.safetensors")
    tensors["model.stray"] = tensors.pop("model.layers.1.self_attn.q_proj.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) missing: model.layers.1.self_attn.q_proj.bias"):
        pm.load(tmp_path)
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(31)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) unknown to qwen2: model.stray"):
        pm.load(tmp_path)
    del tensors["model.stray"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.bias: found shape \(31,\), expected \(32,\)"):
        pm.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        ("llama", {"attention_bias": True}, "found attention_bias: True, expected False"),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "expected full_attention first and sliding_attention after it",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "found scale_attn_by_inverse_layer_idx: True"),
        ("opt", {"enable_bias": False}, "found enable_bias: False, expected True"),
        ("llama", {"hidden_act": "mish"}, "unknown activation 'mish'"),
    ],
)
def test_what_is_not_built_is_refused(
    name: str, change: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    config = json.loads((folders[name] / "config.json").read_text()) | change
    with pytest.raises(ConfigError, match=message):
        ARCHITECTURES[config["model_type"]].model(HubConfigs(config))


def test_a_chat_template_comes_along(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["llama"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    template = "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + eos_token }}{% endfor %}<s>assistant: "
    (tmp_path / "chat_template.jinja").write_text(template)
    ours, theirs = pm.load(tmp_path), reference(tmp_path)
    ids = byte_tokenizer()("<s>user: Hi</s><s>assistant: ", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        assert_close(ours.logits(["Hi"]), theirs(ids).logits[0])
    ours.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == template


SIZES = [(language, name) for language in LANGUAGES.values() for name in language.sizes]


@pytest.mark.parametrize(("language", "name"), SIZES, ids=[name for _, name in SIZES])
def test_published_sizes_have_the_published_parameters(language: Any, name: str) -> None:
    size = language.sizes[name]
    model = ARCHITECTURES[language.name].model(HubConfigs(size.config))
    with no_weights():
        network = MultimodalModel(model, model.tokenizer.rows or 0)
    assert num_parameters(network) == size.parameters
    config = transformers.AutoConfig.for_model(**size.config)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert num_parameters(theirs) == size.parameters


def test_an_unknown_language_model_is_named() -> None:
    with pytest.raises(ConfigError, match="llava: unknown model_type of a language model 'llamas'; did you mean"):
        find_language("llamas", "llava")


def test_a_text_backbone_can_be_named_in_a_recipe(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = {
        "name": "mix",
        "model": {
            "streams": {"image": {"modality": "image", "encoder": {"use": "vit", "image_size": 16, "patch_size": 8,
                "width": 16, "depth": 1, "heads": 2}, "enters": {"use": "sequence"}}},
            "backbone": {"from": str(folders["qwen2"])},
            "heads": {"text": {"from": str(folders["qwen2"])}},
        },
    }  # fmt: skip
    from polymodal.recipes.assemble import assemble
    from polymodal.recipes.loading import load_recipe
    from polymodal.recipes.model import Model

    model = Model(assemble(load_recipe(recipe)))
    assert model.recipe.model.tokenizer.path == str(folders["qwen2"])
    assert np.allclose(model.logits([TEXTS[1]]), pm.load(folders["qwen2"]).logits([TEXTS[1]]), atol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert model.logits(["a", pm.Image(pixels), "b"]).shape == (1 + 1 + 4 + 1, ROWS)


def test_a_model_from_scratch_answers_the_same_in_the_reference_library(tmp_path: Path) -> None:
    from polymodal.modalities.text import CHAT_FORMATS, train_bpe
    from polymodal.recipes.assemble import assemble
    from polymodal.recipes.loading import load_recipe
    from polymodal.recipes.model import Model

    stack = {"width": 32, "depth": 2, "heads": 4, "norm": "rms", "activation": "silu", "gated": True, "bias": False}
    model = {"backbone": {"use": "decoder", "transformer": stack}, "heads": {"text": {"use": "next_token"}}}
    tokenizer = train_bpe(TEXTS, 280, CHAT_FORMATS["turns"].controls)
    ours = Model(assemble(load_recipe({"name": "scratch", "model": model}), tokenizer))
    assert ours.export(tmp_path / "out") == "llama"
    words, theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), reference(tmp_path / "out")
    prompt = words.apply_chat_template(
        [{"role": "user", "content": TEXTS[1]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = theirs.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    assert theirs.generation_config.eos_token_id == tokenizer.control("<|end|>")
    assert list(ours.chat(TEXTS[1], max_new_tokens=16).tokens) == [id for id in answer if id != tokenizer.eos_id]
