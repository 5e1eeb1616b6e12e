"""LLaVA-1.5 against the reference library, with CLIP and Llama and with SigLIP and Qwen2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import polymodal as pm
from polymodal.models.compose import MultimodalModel
from polymodal.models.presets.llava import LLAVA
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .languages import byte_tokenizer
from .prompts import asked, assert_same_answers, assert_same_logits, inputs_of
from .reference import assert_close, assert_same_weights, randomise

transformers = pytest.importorskip("transformers")

_VISION = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": 258,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_RNG = np.random.default_rng(0)
PICTURES = [
    PIL.Image.fromarray(_RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for height, width in ((30, 40), (24, 24), (50, 31))
]
PROMPTS: list[list[Any]] = [
    ["No picture at all, only a rather longer text before the answer."],
    [PICTURES[0], "What?"],
    [PICTURES[1], "and", PICTURES[2], "differ how?"],
]


def make(folder: Path, kind: str) -> Path:
    if kind == "clip":
        vision, text = transformers.CLIPVisionConfig(**_VISION), transformers.LlamaConfig(**_TEXT)
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)
        layer, strategy = -2, "default"
    else:
        vision, text = transformers.SiglipVisionConfig(**_VISION), transformers.Qwen2Config(**_TEXT)
        images = transformers.SiglipImageProcessor(size={"height": 24, "width": 24})
        layer, strategy = -1, "full"
    words = byte_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=9,
    )
    torch.manual_seed(0)
    model = randomise(transformers.LlavaForConditionalGeneration(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "vision" not in name:
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = [257, 17]
    model.generation_config.pad_token_id = 258
    model.save_pretrained(folder)
    processor = transformers.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        chat_template=_TEMPLATE,
        num_additional_image_tokens=int(kind == "clip"),
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make(tmp_path_factory.mktemp(request.param), request.param)
    return folder, transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()


def test_logits_equal_the_reference(made: tuple[Path, Any]) -> None:
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
    expected = inputs_of(folder, PROMPTS[2]).pixel_values
    for picture, theirs in zip(PICTURES[1:], expected, strict=True):
        assert_close(reader.read(pm.Image(picture)).units[0], theirs, rel=1e-3)


def test_export_reloads_there_bit_for_bit(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = made
    assert pm.load(folder).export(tmp_path / "out") == "llava"
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    inputs = inputs_of(tmp_path / "out", PROMPTS[2])
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, reference(**inputs_of(folder, PROMPTS[2])).logits)
    assert pm.load(tmp_path / "out").logits(["Hi"]).tolist() == pm.load(folder).logits(["Hi"]).tolist()


@pytest.mark.parametrize("name", list(LLAVA.sizes))
def test_published_sizes_have_the_references_parameters(name: str) -> None:
    size = LLAVA.sizes[name]
    vision, text = dict(size.config["vision_config"]), dict(size.config["text_config"])
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{k: v for k, v in vision.items() if k != "model_type"}),
        text_config=transformers.LlamaConfig(**{k: v for k, v in text.items() if k != "model_type"}),
    )
    with torch.device("meta"):
        reference = transformers.LlavaForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in reference.parameters()) == size.parameters
    with no_weights():
        ours = MultimodalModel(LLAVA.model(HubConfigs(size.config)), text["vocab_size"])
    assert num_parameters(ours) == size.parameters - size.unused
