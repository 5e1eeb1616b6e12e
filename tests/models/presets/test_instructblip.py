"""InstructBLIP against the reference library, with Llama (Vicuna) and Flan-T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.samples import conversation
from polymodal.inference.encoded import FeatureCache
from polymodal.inference.engine import Generation
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import ModelConfig, MultimodalModel, to_device
from polymodal.models.presets import find_size
from polymodal.models.presets.instructblip import INSTRUCTBLIP
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .bert_tokenizer import bert_tokenizer
from .languages import byte_tokenizer
from .reference import assert_close, assert_same_weights, randomise, save_reference
from .test_blip2 import PICTURES, QFORMER, QUERIES, VISION, sharpen, text_config

transformers = pytest.importorskip("transformers")

QUESTIONS = ["what is it on the grass?", "what?", "a red dog is on the cat."]


def make(folder: Path, kind: str) -> Path:
    words, read = byte_tokenizer(None if kind == "t5" else "<s>"), bert_tokenizer(64)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.InstructBlipConfig(
        vision_config=transformers.InstructBlipVisionConfig(**VISION),
        qformer_config=transformers.InstructBlipQFormerConfig(**{**QFORMER, "vocab_size": len(read) + 2}),
        text_config=text_config(kind),
        num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = randomise(transformers.InstructBlipForConditionalGeneration(config))
    sharpen(model, kind)
    with torch.no_grad():
        model.qformer.embeddings.word_embeddings.weight.mul_(10.0)
        model.qformer.embeddings.position_embeddings.weight.mul_(10.0)
    images = transformers.BlipImageProcessor(size={"height": 24, "width": 24})
    return save_reference(
        model, folder, transformers.InstructBlipProcessor(images, words, read, num_query_tokens=QUERIES)
    )


@pytest.fixture(scope="module", params=["llama", "t5"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    folder = make(tmp_path_factory.mktemp(request.param), request.param)
    return folder, transformers.InstructBlipForConditionalGeneration.from_pretrained(folder).eval(), request.param


def inputs_of(folder: Path, row: int, kind: str, picture: int | None = None) -> Any:
    processor = transformers.InstructBlipProcessor.from_pretrained(folder)
    found = processor(images=PICTURES[row if picture is None else picture], text=QUESTIONS[row], return_tensors="pt")
    if kind == "t5":
        ends = torch.full((1, 1), 257)
        found["input_ids"] = torch.cat((found["input_ids"], ends), 1)
        found["attention_mask"] = torch.cat((found["attention_mask"], torch.ones_like(ends)), 1)
    return found


def samples(answer: bool = False) -> list[pm.Sample]:
    given = {"answer": "A red cat."} if answer else {}
    return [
        conversation(pm.Image(picture), question, id=question, **given)
        for picture, question in zip(PICTURES, QUESTIONS, strict=True)
    ]


def test_logits_equal_the_reference(made: tuple[Path, Any, str]) -> None:
    folder, reference, kind = made
    model = pm.load(folder)
    alone = conversation("no picture at all", answer="Yes.", id="alone")
    plans = [model.engine.processor.plan(sample) for sample in (alone, *samples(answer=True))]
    examples = [model.engine.processor.load(plan) for plan in plans]
    for packed in (False, True):
        with torch.inference_mode():
            outputs = model.network(to_device(model.engine.processor.collate(examples, packed), "cpu"))
        for row, plan in enumerate(plans[1:]):
            inputs = inputs_of(folder, row, kind)
            asked = inputs.input_ids.shape[1]
            assert plan.ids[:asked] == inputs.input_ids[0].tolist()
            target = torch.tensor([plan.ids[asked:]])
            if kind == "t5":
                more = {"decoder_input_ids": target}
            else:
                more, inputs["input_ids"] = {}, torch.cat((inputs.input_ids, target), 1)
                del inputs["attention_mask"]
            with torch.inference_mode():
                theirs = reference(**inputs, **more).logits[0]
            assert_close(outputs.token_logits[outputs.token_samples == row + 1], theirs[-12:-1])


def test_greedy_answers_equal_the_reference(made: tuple[Path, Any, str]) -> None:
    folder, reference, kind = made
    model = pm.load(folder)
    found = model.engine.generate(samples(), Sampling(max_new_tokens=32))
    for row, each in enumerate(found):
        inputs = inputs_of(folder, row, kind)
        with torch.inference_mode():
            ids = reference.generate(**inputs, max_new_tokens=32, do_sample=False)[0].tolist()
        ids = ids[1:] if kind == "t5" else ids[inputs.input_ids.shape[1] :]
        assert each.ids == (ids[: ids.index(257)] if 257 in ids else ids)
    assert len({tuple(each.ids) for each in found}) == 3 and max(len(each.ids) for each in found) == 32


def test_another_question_about_a_picture_is_read_anew(made: tuple[Path, Any, str]) -> None:
    """The picture's tokens depend on what is asked, so that their keys and values serve no other question."""
    folder, _, _ = made
    model = pm.load(folder)
    first, other = (conversation(pm.Image(PICTURES[0]), text) for text in QUESTIONS[:2])
    expected = model.engine.generate([other], Sampling(max_new_tokens=8))[0].ids
    list(model.engine.stream(first, Sampling(max_new_tokens=8)))
    record = Generation()
    assert list(model.engine.stream(other, Sampling(max_new_tokens=8), record)) == expected
    assert record.num_reused_tokens == 0
    tokens = [model.logits([pm.Image(PICTURES[0]), text])[0] for text in QUESTIONS[:2]]
    assert abs(tokens[0] - tokens[1]).max() > 1e-3


def test_a_picture_that_is_asked_about_again_is_encoded_once(made: tuple[Path, Any, str]) -> None:
    """Its features do not depend on what is asked, unlike its tokens."""
    folder, _, _ = made
    model, fresh, seen = pm.load(folder), pm.load(folder), []
    model.network.streams["image"].encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    asked = [conversation(pm.Image(PICTURES[0]), text, id=text) for text in QUESTIONS]
    answers = [list(model.engine.stream(each, Sampling(max_new_tokens=8))) for each in asked]
    assert seen == [1], "the later questions encode nothing"
    assert answers == [list(fresh.engine.stream(each, Sampling(max_new_tokens=8))) for each in reversed(asked)][::-1]
    other = conversation(pm.Image(PICTURES[1]), pm.Image(PICTURES[0]), QUESTIONS[0], id="both")
    list(model.engine.stream(other, Sampling(max_new_tokens=8)))
    assert seen == [1, 1], "of two pictures the new one is encoded"

    seen.clear()
    model.engine.encoded = FeatureCache(0)
    together = model.engine.generate([*asked, other], Sampling(max_new_tokens=8))
    assert seen == [2], "each picture of a batch once"
    assert [each.ids for each in together[:3]] == answers


def test_export_reloads_there_bit_for_bit(made: tuple[Path, Any, str], tmp_path: Path) -> None:
    folder, reference, kind = made
    assert pm.load(folder).export(tmp_path / "out") == "instructblip"
    again = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    one, other = inputs_of(tmp_path / "out", 0, kind), inputs_of(folder, 0, kind)
    assert one.qformer_input_ids.tolist() == other.qformer_input_ids.tolist()
    with torch.inference_mode():
        rows = [each.generate(**one, max_new_tokens=8, do_sample=False) for each in (again, reference)]
    assert torch.equal(*rows)


def test_words_that_nobody_gives_are_refused() -> None:
    data = INSTRUCTBLIP.to_model(HubConfigs({"model_type": "instructblip"}))
    with pytest.raises(ConfigError, match=r"connectors that read words in \['image'\] and words in \[\], expected one"):
        ModelConfig.parse({**data, "streams": {"image": data["streams"]["image"]}})
    narrow = {**data["streams"]["instruction"], "encoder": {"use": "embedding", "width": 32}}
    with pytest.raises(ConfigError, match="found text of width 32, expected text of width 768"):
        ModelConfig.parse({**data, "streams": {**data["streams"], "instruction": narrow}})


@pytest.mark.parametrize("name", list(INSTRUCTBLIP.sizes))
def test_published_sizes_have_the_references_parameters(name: str) -> None:
    _, size = find_size(name)
    config = transformers.InstructBlipConfig(**{k: v for k, v in size.config.items() if k != "model_type"})
    with torch.device("meta"):
        reference = transformers.InstructBlipForConditionalGeneration(config)
    text = size.config["text_config"]
    with no_weights():
        ours = MultimodalModel(INSTRUCTBLIP.model(HubConfigs(size.config)), text["vocab_size"])
    # The reference library ties what Flan-T5 keeps apart.
    untied = text["vocab_size"] * text["d_model"] if "t5" in name else 0
    assert num_parameters(ours) == num_parameters(reference) + untied == size.parameters
