"""Qwen2-Audio against the reference library: several clips in a prompt, and none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError
from polymodal.core.samples import conversation
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.presets.qwen2_audio import QWEN2_AUDIO
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .languages import byte_tokenizer
from .prompts import assert_same_answers, assert_same_logits
from .reference import assert_same_weights, randomise

transformers = pytest.importorskip("transformers")

RATE = 16_000
_AUDIO = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 16,
    "max_source_positions": 50,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": 258,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
_CONTROLS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>"]
_RNG = np.random.default_rng(0)
CLIPS = [_RNG.uniform(-0.9, 0.9, length).astype(np.float32) for length in (16_000, 5_000, 9_330, 2_100)]
PROMPTS: list[list[Any]] = [
    ["Nothing to hear, only a rather longer text before the answer."],
    [CLIPS[0], "What is that?"],
    [CLIPS[1], "and", CLIPS[2], "differ how?", CLIPS[3]],
]


def make(folder: Path) -> Path:
    words = byte_tokenizer(bos=None)
    words.add_special_tokens({"additional_special_tokens": _CONTROLS})
    config = transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(**_AUDIO),
        text_config=transformers.Qwen2Config(**_TEXT),
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    model = randomise(transformers.Qwen2AudioForConditionalGeneration(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "audio_tower" not in name:
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = [257, 17]
    model.generation_config.pad_token_id = 258
    model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    # The library's own template for chats, which it takes where none is given.
    transformers.Qwen2AudioProcessor(extractor, words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make(tmp_path_factory.mktemp("qwen2_audio"))
    return folder, transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()


def inputs_of(folder: Path, prompt: list[Any]) -> Any:
    processor = transformers.Qwen2AudioProcessor.from_pretrained(folder)
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "audio"} for part in prompt]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    clips = [part for part in prompt if not isinstance(part, str)]
    return processor(text=text, audio=clips or None, sampling_rate=RATE, return_tensors="pt")


def asked(prompt: list[Any]) -> pm.Sample:
    return conversation(*(part if isinstance(part, str) else pm.Audio(part, rate_hz=RATE) for part in prompt))


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


def test_the_sound_changes_the_answer(made: tuple[Path, Any]) -> None:
    model = pm.load(made[0])
    logits = []
    for clip in (CLIPS[0], CLIPS[0][::-1].copy()):
        batch = to_device(model.engine.processor.batch([asked([clip, "What?"])], prompt=True), "cpu")
        with torch.inference_mode():
            logits.append(model.network.token_logits(model.network.states(batch))[0, -1])
    assert not torch.allclose(*logits, atol=1e-3)


def test_export_reloads_there_bit_for_bit(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = made
    assert pm.load(folder).export(tmp_path / "out") == "qwen2_audio"
    again = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    inputs = inputs_of(tmp_path / "out", PROMPTS[2])
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, reference(**inputs_of(folder, PROMPTS[2])).logits)
    assert pm.load(tmp_path / "out").logits(["Hi"]).tolist() == pm.load(folder).logits(["Hi"]).tolist()


def test_a_missing_tensor_is_named(made: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = made
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("multi_modal_projector.linear.bias"))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.linear\.bias"):
        pm.load(tmp_path)


def test_the_published_size_has_the_references_parameters() -> None:
    size = QWEN2_AUDIO.sizes["qwen2-audio-7b"]  # published: 8.4B
    text = {key: value for key, value in size.config["text_config"].items() if key != "model_type"}
    config = transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(), text_config=transformers.Qwen2Config(**text)
    )
    with torch.device("meta"):
        reference = transformers.Qwen2AudioForConditionalGeneration(config)
    with no_weights():
        ours = MultimodalModel(QWEN2_AUDIO.model(HubConfigs(size.config, size.preprocessor)), text["vocab_size"])
    # The positions are a parameter there, and stored but never trained in both.
    mine = num_parameters(ours) + ours.streams["audio"].encoder.positions_ND.numel()
    assert mine == num_parameters(reference) == size.parameters
