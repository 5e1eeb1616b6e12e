"""MiniGPT-4: BLIP-2's layout with a Llama, in its own turns; the reference library's class is BLIP-2's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.samples import conversation
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.presets import find_size
from polymodal.models.presets.minigpt4 import MINIGPT4
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .reference import assert_close, assert_same_weights
from .test_blip2 import PICTURES, QUERIES, make

transformers = pytest.importorskip("transformers")

SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions.###"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make(tmp_path_factory.mktemp("minigpt4"), "llama")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "model_type": "minigpt4"}))
    return made


def test_logits_in_its_turns_equal_the_reference(folder: Path, tmp_path: Path) -> None:
    model = pm.load(folder)
    asked = conversation(pm.Image(PICTURES[0]), "What is it?")
    plan = model.engine.processor.plan(asked, prompt=True)
    words = model.tokenizer
    before, after = f"{SYSTEM}Human: <Img>", "</Img> What is it?###Assistant:"
    media = [words.media_id] * QUERIES
    assert plan.ids == [*words.prefix, *words.encode(before), *media, *words.encode(after)]
    assert model.export(tmp_path / "blip2", "blip-2") == "blip-2"
    reference = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "blip2").eval()
    processor = transformers.Blip2Processor.from_pretrained(tmp_path / "blip2")
    pixels = processor(images=PICTURES[0], text="", return_tensors="pt").pixel_values
    batch = to_device(model.engine.processor.collate([model.engine.processor.load(plan)], packed=False), "cpu")
    with torch.inference_mode():
        ours = model.network.token_logits(model.network.states(batch))
        assert_close(ours, reference(pixel_values=pixels, input_ids=torch.tensor([plan.ids])).logits)
    answered = model.engine.processor.plan(
        conversation(pm.Image(PICTURES[0]), "What is it?", answer="A cat.", id="answered")
    )
    targets = [id for id, is_target in zip(answered.ids, answered.is_supervised, strict=True) if is_target]
    assert targets == [*words.encode(" A cat.###"), words.eos_id]


def test_an_export_under_its_own_name_keeps_the_turns(folder: Path, tmp_path: Path) -> None:
    model = pm.load(folder)
    assert model.export(tmp_path / "own") == "minigpt4", "the layout that it came from"
    again = pm.load(tmp_path / "own")
    assert again.recipe.model.backbone.chat == "minigpt-4"
    assert_same_weights(again.network, model.network)


def test_another_language_model_is_refused(folder: Path) -> None:
    config = {"model_type": "minigpt4", "text_config": {"model_type": "opt"}}
    with pytest.raises(ConfigError, match="found model_type: 'opt', expected 'llama'"):
        MINIGPT4.model(HubConfigs(config))


@pytest.mark.parametrize("name", list(MINIGPT4.sizes))
def test_published_sizes_have_the_references_parameters(name: str) -> None:
    _, size = find_size(name)
    config = transformers.Blip2Config(**{key: value for key, value in size.config.items() if key != "model_type"})
    with torch.device("meta"):
        reference = transformers.Blip2ForConditionalGeneration(config)
    with no_weights():
        ours = MultimodalModel(MINIGPT4.model(HubConfigs(size.config)), size.config["text_config"]["vocab_size"])
    assert num_parameters(ours) == num_parameters(reference) == size.parameters
