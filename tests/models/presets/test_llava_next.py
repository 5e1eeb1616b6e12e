"""LLaVA-NeXT against the reference library, with Llama and with Mistral: tiles of many proportions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.compose import MultimodalModel
from polymodal.models.presets.llava_next import LLAVA_NEXT
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .languages import byte_tokenizer
from .prompts import asked, assert_same_answers, assert_same_logits, inputs_of
from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise

transformers = pytest.importorskip("transformers")

PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": 258,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'video' %}<video>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_RNG = np.random.default_rng(0)
SIZES = ((30, 40), (24, 24), (50, 31), (90, 20), (17, 95), (200, 150), (70, 24), (23, 47))
PICTURES = [PIL.Image.fromarray(_RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in SIZES]
PROMPTS: list[list[Any]] = [
    ["No picture at all, only a rather longer text before the answer."],
    [PICTURES[0], "What?"],
    [PICTURES[1], "and", PICTURES[3], "differ how?", PICTURES[4]],
    [PICTURES[2], PICTURES[5], PICTURES[6], PICTURES[7], "?"],
]


def sharpen(model: Any) -> Any:
    """Telling weights, sharp enough that greedy choices differ from step to step."""
    with torch.no_grad():
        for name, parameter in randomise(model).named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "vision" not in name:
                parameter.mul_(2.0)
            if name.endswith("image_newline"):
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = [257, 17]
    model.generation_config.pad_token_id = 258
    return model


def make(folder: Path, kind: str) -> Path:
    text = (
        transformers.LlamaConfig(**_TEXT)
        if kind == "llama"
        else transformers.MistralConfig(**_TEXT, sliding_window=None)
    )
    words = byte_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=9,
    )
    torch.manual_seed(0)
    sharpen(transformers.LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=PINPOINTS
    )
    transformers.LlavaNextProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "mistral"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make(tmp_path_factory.mktemp(request.param), request.param)
    return folder, transformers.LlavaNextForConditionalGeneration.from_pretrained(folder).eval()


def test_logits_and_placeholders_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, reference = made
    model = pm.load(folder)
    for prompt in PROMPTS:
        inputs = inputs_of(folder, prompt)
        plan = model.engine.processor.plan(asked(prompt), prompt=True)
        assert plan.ids == inputs.input_ids[0].tolist()
        assert_same_logits(model, plan, reference, inputs)


def test_greedy_answers_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, reference = made
    inputs = [inputs_of(folder, prompt) for prompt in PROMPTS]
    assert_same_answers(pm.load(folder), [asked(prompt) for prompt in PROMPTS], reference, inputs)


def test_pixels_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, _ = made
    reader = pm.load(folder).engine.processor.streams["image"].reader
    for prompt in PROMPTS[1:]:
        expected = inputs_of(folder, prompt).pixel_values
        pictures = [part for part in prompt if not isinstance(part, str)]
        for picture, theirs in zip(pictures, expected, strict=True):
            units = reader.read(pm.Image(picture)).units
            assert_close(np.stack(units), theirs[: len(units)], rel=1e-3)
            assert not theirs[len(units) :].any()


def test_export_reloads_there_bit_for_bit(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = made
    assert pm.load(folder).export(tmp_path / "out") == "llava_next"
    again = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    inputs = inputs_of(tmp_path / "out", PROMPTS[2])
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, reference(**inputs_of(folder, PROMPTS[2])).logits)
    assert pm.load(tmp_path / "out").logits(["Hi"]).tolist() == pm.load(folder).logits(["Hi"]).tolist()


def test_a_missing_newline_is_named(made: tuple[Path, Any]) -> None:
    assert_missing_is_named(made[0], "image_newline")


def test_grids_that_disagree_are_refused(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_grid_pinpoints": PINPOINTS[1:]}))
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints: found .* expected the same"):
        pm.load(tmp_path)


@pytest.mark.parametrize("name", list(LLAVA_NEXT.sizes))
def test_published_sizes_have_the_references_parameters(name: str) -> None:
    # Published as 7B and 13B: the language model's size; the tower adds 304M.
    size = LLAVA_NEXT.sizes[name]
    vision, text = dict(size.config["vision_config"]), dict(size.config["text_config"])
    kind = transformers.MistralConfig if text.get("model_type") == "mistral" else transformers.LlamaConfig
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**{k: v for k, v in vision.items() if k != "model_type"}),
        text_config=kind(**{k: v for k, v in text.items() if k != "model_type"}),
    )
    with torch.device("meta"):
        reference = transformers.LlavaNextForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in reference.parameters()) == size.parameters
    with no_weights():
        ours = MultimodalModel(LLAVA_NEXT.model(HubConfigs(size.config)), text["vocab_size"])
    assert num_parameters(ours) == size.parameters - size.unused
