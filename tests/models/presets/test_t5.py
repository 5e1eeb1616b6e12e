"""T5 and Flan-T5 against the reference library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.samples import conversation
from polymodal.inference.engine import Generation
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.presets import find_size
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .languages import byte_tokenizer
from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

ROWS = 300
SMALL = {
    "vocab_size": ROWS, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {"t5": {}, "flan": FLAN}
QUESTIONS = [
    "translate English to German: The house is wonderful, and so is the garden behind it.",
    "?",
    "summarize: a b c d e f g",
]


def make(folder: Path, changes: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    words = byte_tokenizer(None)
    special = {"pad_token_id": words.pad_token_id, "decoder_start_token_id": words.pad_token_id}
    config = transformers.T5Config(**SMALL, **changes, **special, eos_token_id=words.eos_token_id)
    model = randomise(transformers.T5ForConditionalGeneration(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "shared" not in name and "lm_head" not in name:
                parameter.mul_(3.0)
        model.shared.weight[:32] *= 0.1
        model.shared.weight[words.eos_token_id] *= 0.05
        model.shared.weight[256:] *= 0.05
    return save_reference(model, folder, words)


@pytest.fixture(scope="module", params=list(CASES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp(request.param), CASES[request.param])


def reference_of(folder: Path) -> Any:
    return transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()


def asked(words: Any, texts: list[str]) -> Any:
    words.padding_side = "right"
    return words([text + "</s>" for text in texts], return_tensors="pt", padding=True, add_special_tokens=False)


def test_logits_equal_the_reference(folder: Path) -> None:
    model, reference = pm.load(folder), reference_of(folder)
    samples = [
        conversation(text, answer="Das Haus ist wunderbar." * (1 + i), id=text) for i, text in enumerate(QUESTIONS)
    ]
    words = transformers.AutoTokenizer.from_pretrained(folder)
    for packed in (False, True):
        examples = [model.engine.processor.load(model.engine.processor.plan(sample)) for sample in samples]
        batch = to_device(model.engine.processor.collate(examples, packed), "cpu")
        with torch.no_grad():
            outputs = model.network(batch)
        for row, sample in enumerate(samples):
            answer = words(sample.messages[-1].text + "</s>", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = reference(
                    **asked(words, [QUESTIONS[row]]),
                    decoder_input_ids=torch.tensor([[words.pad_token_id, *answer[:-1]]]),
                ).logits
            assert_close(outputs.token_logits[outputs.token_samples == row], logits[0])
    single = model.logits([QUESTIONS[0]])
    assert single.shape == (1, ROWS)


def test_greedy_answers_equal_the_reference(folder: Path) -> None:
    model, reference = pm.load(folder), reference_of(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [conversation(text) for text in QUESTIONS]
    found = model.engine.generate(prompts, Sampling(max_new_tokens=32))
    with torch.no_grad():
        # Its cache has as many layers as the encoder, which breaks on a deeper decoder.
        ids = reference.generate(**asked(words, QUESTIONS), max_new_tokens=32, use_cache=False)
    for ours, theirs in zip(found, ids.tolist(), strict=True):
        expected = theirs[1:]
        expected = expected[: expected.index(words.eos_token_id)] if words.eos_token_id in expected else expected
        assert ours.ids == expected
    assert len({tuple(each.ids) for each in found}) == 3 and max(len(set(each.ids)) for each in found) > 5
    assert max(len(each.ids) for each in found) == 32
    record = Generation()
    assert list(model.engine.stream(prompts[0], Sampling(max_new_tokens=32), record)) == found[0].ids
    assert list(model.engine.stream(prompts[0], Sampling(max_new_tokens=32), record)) == found[0].ids
    assert record.num_reused_tokens == 0, "a question that changes at its end changes the states of its beginning"


def test_export_reloads_there_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    assert pm.load(folder).export(tmp_path / "out") == "t5"
    again, reference = reference_of(tmp_path / "out"), reference_of(folder)
    assert_same_weights(again, reference)
    assert again.config.scale_decoder_outputs == reference.config.scale_decoder_outputs
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        one, other = (
            each.generate(**asked(words, QUESTIONS), max_new_tokens=16, use_cache=False) for each in (again, reference)
        )
    assert torch.equal(one, other)


def test_a_head_of_its_own_is_read_where_it_is_stored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make(tmp_path, FLAN)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["shared.weight"]
    save_file(tensors, folder / "model.safetensors")
    network = pm.load(folder).network
    assert torch.equal(network.heads["text"].proj.weight, 2 * network.backbone.embed_tokens.weight)


def test_what_there_is_no_native_form_of_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "feed_forward_proj": "swish"}))
    with pytest.raises(ConfigError, match="found feed_forward_proj: 'swish', expected one of"):
        pm.load(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    assert_missing_is_named(make(tmp_path, {}), "decoder.block.1.layer.1.EncDecAttention.k.weight")


@pytest.mark.parametrize("name", list(find_size("t5-small")[0].sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    architecture, size = find_size(name)
    model = architecture.model(HubConfigs(size.config))
    with no_weights():
        ours = num_parameters(MultimodalModel(model, size.config["vocab_size"]))
    config = transformers.T5Config(**size.config)
    with torch.device("meta"):
        reference = transformers.T5ForConditionalGeneration(config)
    theirs = num_parameters(reference)
    if size.config.get("tie_word_embeddings") is False and reference.lm_head.weight is reference.shared.weight:
        theirs += reference.shared.weight.numel()
    assert ours == theirs == size.parameters
