"""BLIP-2 against the reference library, with OPT, Llama (MiniGPT-4) and Flan-T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.samples import conversation
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.presets import find_size
from polymodal.models.presets.blip2 import BLIP2
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .languages import byte_tokenizer
from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

ROWS, QUERIES = 300, 5
VISION = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip
QFORMER = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60,
    "max_position_embeddings": 64,
}  # fmt: skip
SPECIAL = {"pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257}
OPT = {
    "hidden_size": 40, "word_embed_proj_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
    "max_position_embeddings": 256, "vocab_size": ROWS, **SPECIAL,
}  # fmt: skip
LLAMA = {
    "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 256, "vocab_size": ROWS, **SPECIAL,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": ROWS,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False, "pad_token_id": 258, "eos_token_id": 257, "decoder_start_token_id": 258,
}  # fmt: skip
_RNG = np.random.default_rng(0)
PICTURES = [
    PIL.Image.fromarray(_RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for height, width in ((30, 40), (24, 24), (50, 31))
]
QUESTIONS = ["Question: what is it, and where does it stand? Answer:", "What?", "a photo of"]


def text_config(kind: str) -> Any:
    if kind == "opt":
        return transformers.OPTConfig(**OPT)
    return transformers.LlamaConfig(**LLAMA) if kind == "llama" else transformers.T5Config(**T5)


def make(folder: Path, kind: str) -> Path:
    words = byte_tokenizer(None if kind == "t5" else "<s>")
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**VISION),
        qformer_config=transformers.Blip2QFormerConfig(**QFORMER),
        text_config=text_config(kind),
        num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = randomise(transformers.Blip2ForConditionalGeneration(config))
    sharpen(model, kind)
    processor = transformers.Blip2Processor(
        transformers.BlipImageProcessor(size={"height": 24, "width": 24}), words, num_query_tokens=QUERIES
    )
    return save_reference(model, folder, processor)


@torch.no_grad()
def sharpen(model: Any, kind: str) -> None:
    """Weights with which greedy choices differ from step to step and from picture to picture."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name.startswith("language_model") and "embed" not in name and "shared" not in name:
            parameter.mul_(3.0 if kind == "t5" else 2.0)
        if "qformer" in name and parameter.ndim == 2:
            parameter.mul_(3.0)
    model.query_tokens.mul_(10.0)
    if kind == "t5":
        shared = model.language_model.shared.weight
        shared[:32] *= 0.1
        shared[256:] *= 0.05


@pytest.fixture(scope="module", params=["opt", "llama", "t5"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    folder = make(tmp_path_factory.mktemp(request.param), request.param)
    return folder, transformers.Blip2ForConditionalGeneration.from_pretrained(folder).eval(), request.param


def inputs_of(folder: Path, row: int, kind: str, picture: bool = True) -> Any:
    processor = transformers.Blip2Processor.from_pretrained(folder)
    text = QUESTIONS[row] + ("</s>" if kind == "t5" else "")
    return processor(images=PICTURES[row] if picture else None, text=text, return_tensors="pt")


def samples(answer: bool = False) -> list[pm.Sample]:
    # The place of the picture in the conversation does not matter: it always comes first.
    parts = [(pm.Image(PICTURES[0]), QUESTIONS[0]), (QUESTIONS[1], pm.Image(PICTURES[1])), (QUESTIONS[2],)]
    given = {"answer": "A red cat."} if answer else {}
    return [conversation(*each, id=str(row), **given) for row, each in enumerate(parts)]


def test_logits_equal_the_reference(made: tuple[Path, Any, str]) -> None:
    folder, reference, kind = made
    model = pm.load(folder)
    plans = [model.engine.processor.plan(sample) for sample in samples(answer=True)]
    examples = [model.engine.processor.load(plan) for plan in plans]
    for packed in (False, True):
        with torch.inference_mode():
            outputs = model.network(to_device(model.engine.processor.collate(examples, packed), "cpu"))
        for row, plan in enumerate(plans):
            inputs = inputs_of(folder, row, kind, picture=row < 2)
            asked = inputs.input_ids.shape[1]
            media, rest = plan.ids[: QUERIES * (row < 2)], plan.ids[asked:]
            assert len(media) == media.count(model.engine.processor.tokenizer.media_id)
            assert plan.ids[:asked] == inputs.input_ids[0].tolist()
            target = torch.tensor([rest])
            if kind == "t5":
                more = {"input_ids": inputs.input_ids, "decoder_input_ids": target}
            else:
                more = {"input_ids": torch.cat((inputs.input_ids, target), 1)}
            with torch.inference_mode():
                if row < 2:
                    theirs = reference(pixel_values=inputs.pixel_values, **more).logits[0]
                else:
                    theirs = reference.language_model(**more).logits[0]
            count = sum(plan.is_supervised)
            assert count == 11
            assert_close(outputs.token_logits[outputs.token_samples == row], theirs[-count - 1 : -1])


def test_greedy_answers_equal_the_reference(made: tuple[Path, Any, str]) -> None:
    folder, reference, kind = made
    model = pm.load(folder)
    found = model.engine.generate(samples(), Sampling(max_new_tokens=32))
    for row, each in enumerate(found):
        inputs = inputs_of(folder, row, kind, picture=row < 2)
        with torch.inference_mode():
            generate = reference.generate if row < 2 else reference.language_model.generate
            ids = generate(**inputs, max_new_tokens=32, do_sample=False)[0].tolist()
        ids = ids[1:] if kind == "t5" else ids[inputs.input_ids.shape[1] :]
        assert each.ids == (ids[: ids.index(257)] if 257 in ids else ids)
    assert len({tuple(each.ids) for each in found}) == 3 and max(len(set(each.ids)) for each in found) > 5
    assert max(len(each.ids) for each in found) == 32
    assert list(model.engine.stream(samples()[1], Sampling(max_new_tokens=32))) == found[1].ids


def test_pixels_equal_the_reference(made: tuple[Path, Any, str]) -> None:
    folder, _, kind = made
    reader = pm.load(folder).engine.processor.streams["image"].reader
    for row, picture in enumerate(PICTURES):
        expected = inputs_of(folder, row, kind).pixel_values[0]
        assert_close(reader.read(pm.Image(picture)).units[0], expected, rel=1e-3)


def test_export_reloads_there_bit_for_bit(made: tuple[Path, Any, str], tmp_path: Path) -> None:
    folder, reference, kind = made
    assert pm.load(folder).export(tmp_path / "out") == "blip-2"
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    inputs = inputs_of(tmp_path / "out", 0, kind)
    assert inputs.input_ids.tolist() == inputs_of(folder, 0, kind).input_ids.tolist()
    with torch.inference_mode():
        one, other = (each.generate(**inputs, max_new_tokens=8, do_sample=False) for each in (again, reference))
    assert torch.equal(one, other)


def test_a_missing_tensor_is_named(made: tuple[Path, Any, str]) -> None:
    assert_missing_is_named(made[0], "qformer.encoder.layer.2.crossattention.attention.key.weight")


def test_a_picture_in_an_answer_is_refused(made: tuple[Path, Any, str]) -> None:
    picture = pm.Image(PICTURES[0])
    messages = (pm.Message("user", (pm.Text("Draw."),)), pm.Message("assistant", (picture, pm.Text("Here."))))
    with pytest.raises(SampleError, match="image in an assistant turn; only text can be an answer"):
        pm.load(made[0]).engine.processor.plan(pm.Sample("drawn", messages=messages))


def test_a_qformer_that_reads_text_is_refused() -> None:
    config = {"model_type": "blip-2", "qformer_config": {"use_qformer_text_input": True}}
    with pytest.raises(ConfigError, match="found use_qformer_text_input: True, expected False"):
        BLIP2.model(HubConfigs(config))


@pytest.mark.parametrize("name", list(BLIP2.sizes))
def test_published_sizes_have_the_references_parameters(name: str) -> None:
    _, size = find_size(name)
    config = transformers.Blip2Config(**{key: value for key, value in size.config.items() if key != "model_type"})
    with torch.device("meta"):
        reference = transformers.Blip2ForConditionalGeneration(config)
    with no_weights():
        ours = MultimodalModel(BLIP2.model(HubConfigs(size.config)), size.config["text_config"]["vocab_size"])
    theirs = num_parameters(reference)
    if "t5" in name:
        # The reference library ties what Flan-T5 keeps apart.
        theirs += size.config["text_config"]["vocab_size"] * size.config["text_config"]["d_model"]
    assert num_parameters(ours) == theirs == size.parameters
