"""BLIP for captions and for questions against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.samples import conversation
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import to_device
from polymodal.models.presets import find_size

from .bert_tokenizer import bert_tokenizer
from .pairs import PICTURES, TEXTS
from .reference import (
    assert_close,
    assert_missing_is_named,
    assert_published_size,
    assert_same_weights,
    randomise,
    save_reference,
)

transformers = pytest.importorskip("transformers")

KINDS = {"caption": "BlipForConditionalGeneration", "answer": "BlipForQuestionAnswering"}
GREEDY = {"max_new_tokens": 32, "do_sample": False, "num_beams": 1}


def make(folder: Path, kind: str) -> Path:
    tokenizer = bert_tokenizer(64)
    sep, pad = tokenizer.sep_token_id, tokenizer.pad_token_id
    ids = {"bos_token_id": len(tokenizer), "sep_token_id": sep, "pad_token_id": pad}
    # Looking at the picture and at the question, the reference uses layers of one size.
    image_width = 24 if kind == KINDS["caption"] else 32
    sizes = {"num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BlipConfig(
        text_config={
            **sizes, **ids, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer) + 2,
            "max_position_embeddings": 64, "eos_token_id": sep,
        },
        vision_config={**sizes, "hidden_size": image_width, "num_hidden_layers": 3, "image_size": 24, "patch_size": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomise(getattr(transformers, kind)(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder.layer" in name and parameter.ndim == 2:
                parameter.mul_(3)
        model.text_decoder.bert.embeddings.word_embeddings.weight.mul_(4)
        model.text_decoder.bert.embeddings.position_embeddings.weight.mul_(12)
        model.text_decoder.cls.predictions.bias[tokenizer.sep_token_id] -= 100
        model.text_decoder.cls.predictions.bias[:3] -= 100
    images = transformers.BlipImageProcessor(size={"height": 24, "width": 24})
    return save_reference(model, folder, transformers.BlipProcessor(images, tokenizer))


@pytest.fixture(scope="module", params=list(KINDS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    kind = KINDS[request.param]
    folder = make(tmp_path_factory.mktemp(request.param), kind)
    return folder, getattr(transformers, kind).from_pretrained(folder).eval()


def inputs_of(folder: Path, row: int, *, with_text: bool = True) -> Any:
    processor = transformers.BlipProcessor.from_pretrained(folder)
    return processor(PICTURES[row], TEXTS[row] if with_text else None, return_tensors="pt")


def is_caption(folder: Path) -> bool:
    return "caption" in folder.name


def test_logits_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, reference = made
    model = pm.load(folder)
    samples = [
        conversation(pm.Image(picture), text, answer="the red cat." * (1 + row), id=str(row))
        for row, (picture, text) in enumerate(zip(PICTURES, TEXTS, strict=True))
    ]
    plans = [model.engine.processor.plan(sample) for sample in samples]
    for packed in (False, True):
        examples = [model.engine.processor.load(plan) for plan in plans]
        with torch.inference_mode():
            outputs = model.network(to_device(model.engine.processor.collate(examples, packed), "cpu"))
        for row, plan in enumerate(plans):
            inputs = inputs_of(folder, row)
            said = torch.tensor([plan.ids[plan.num_source :]])
            with torch.inference_mode():
                seen = reference.vision_model(inputs.pixel_values)[0]
                if not is_caption(folder):
                    assert plan.ids[: plan.num_source] == inputs.input_ids[0].tolist()
                    seen = reference.text_encoder(inputs.input_ids, encoder_hidden_states=seen)[0]
                theirs = reference.text_decoder(said, encoder_hidden_states=seen).logits[0, :-1]
            count = sum(plan.is_supervised)
            assert_close(outputs.token_logits[outputs.token_samples == row], theirs[-count:])


def test_what_is_written_equals_the_reference(made: tuple[Path, Any]) -> None:
    folder, reference = made
    model = pm.load(folder)
    asked = [conversation(pm.Image(picture), text) for picture, text in zip(PICTURES, TEXTS, strict=True)]
    found = model.engine.generate(asked, Sampling(max_new_tokens=32))
    for row, each in enumerate(found):
        inputs = inputs_of(folder, row)
        with torch.inference_mode():
            ids = reference.generate(**inputs, **GREEDY)[0].tolist()
        assert each.ids == ids[-32:] and len(each.ids) == 32
    assert len({tuple(each.ids) for each in found}) == 3 and len({id for each in found for id in each.ids}) > 3
    assert list(model.engine.stream(asked[1], Sampling(max_new_tokens=32))) == found[1].ids


def test_a_picture_alone_gets_its_caption(tmp_path: Path) -> None:
    folder = make(tmp_path, KINDS["caption"])
    reference = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    model = pm.load(folder)
    for row, picture in enumerate(PICTURES):
        with torch.inference_mode():
            ids = reference.generate(**inputs_of(folder, row, with_text=False), **GREEDY)[0].tolist()
        answer = model.chat(pm.Image(picture), max_new_tokens=32)
        assert list(answer.tokens) == ids[1:]


def test_pixels_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, _ = made
    reader = pm.load(folder).engine.processor.streams["image"].reader
    for row, picture in enumerate(PICTURES):
        expected = inputs_of(folder, row).pixel_values[0]
        assert np.abs(reader.read(pm.Image(picture)).units[0] - expected.numpy()).max() < 1e-3


def test_export_reloads_there_bit_for_bit(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = made
    assert pm.load(folder).export(tmp_path / "out") == "blip"
    again = type(reference).from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    with torch.inference_mode():
        one, other = (each.generate(**inputs_of(folder, 0), **GREEDY) for each in (again, reference))
    assert torch.equal(one, other)


def test_a_missing_tensor_is_named(made: tuple[Path, Any]) -> None:
    assert_missing_is_named(made[0], "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight")


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, KINDS["caption"])
    text = (folder / "config.json").read_text()
    start = len(bert_tokenizer(64))
    (folder / "config.json").write_text(text.replace(f'"bos_token_id": {start}', f'"bos_token_id": {start + 1}'))
    with pytest.raises(ConfigError, match=rf"begins with the id {start + 1}, and the next free one .* is {start}"):
        pm.load(folder)


@pytest.mark.parametrize("name", list(find_size("blip-vqa-base")[0].sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    assert_published_size(name, rows=30524)
