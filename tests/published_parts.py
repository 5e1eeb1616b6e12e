"""Small published checkpoints, each as the reference library saves it, and samples of every modality that they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import soundfile
import torch
import transformers
from adapter_references import language_model, noisy, tower
from models.presets.clip_tokenizer import clip_tokenizer
from models.presets.languages import byte_tokenizer
from models.presets.reference import save_reference

_STACK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGE = {**_STACK, "image_size": 32, "patch_size": 8}
_TEXT = {
    **_STACK, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
_WAVE = {
    **_STACK, "conv_dim": [16, 24], "conv_kernel": [10, 3], "conv_stride": [40, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_ENDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _cropped(kind: str) -> Any:
    return getattr(transformers, kind)(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})


def _stretched(kind: str) -> Any:
    return getattr(transformers, kind)(size={"height": 32, "width": 32})


def _frames() -> Any:
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    return VideoMAEImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})


def _mels() -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1, return_attention_mask=True)


def _clip() -> list[Any]:
    words = clip_tokenizer(16)
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    texts = {**_STACK, "hidden_size": 24, "max_position_embeddings": 16, "vocab_size": len(words), **ids}
    config = transformers.CLIPConfig(text_config=texts, vision_config=_IMAGE, projection_dim=20)
    return [transformers.CLIPModel(config), words, _cropped("CLIPImageProcessor")]


def _dinov2() -> list[Any]:
    return [transformers.Dinov2Model(transformers.Dinov2Config(**_IMAGE)), _cropped("BitImageProcessor")]


def _resnet() -> list[Any]:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
    return [transformers.ResNetModel(config), transformers.ConvNextImageProcessor(size={"shortest_edge": 32})]


def _whisper() -> list[Any]:
    words = byte_tokenizer()
    controls = ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]
    words.add_special_tokens({"additional_special_tokens": controls})
    config = transformers.WhisperConfig(
        vocab_size=300, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=50,
        max_target_positions=60, decoder_start_token_id=256, suppress_tokens=None, begin_suppress_tokens=None, **_ENDS,
    )  # fmt: skip
    return [transformers.WhisperForConditionalGeneration(config), words, _mels()]


def _qwen2_audio() -> list[Any]:
    config = transformers.Qwen2AudioEncoderConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=16,
        max_source_positions=50,
    )  # fmt: skip
    return [transformers.Qwen2AudioEncoder(config), _mels()]


def _wave(family: str) -> list[Any]:
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**_WAVE))
    return [model, transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)]


def _video(family: str, **more: Any) -> list[Any]:
    config = getattr(transformers, f"{family}Config")(**{**_IMAGE, "image_size": 16, "num_frames": 4, **more})
    return [getattr(transformers, f"{family}Model")(config), _frames()]


def _patchtst() -> list[Any]:
    config = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=32, num_hidden_layers=2,
        num_attention_heads=4, ffn_dim=48,
    )  # fmt: skip
    return [transformers.PatchTSTModel(config)]


def _language(family: str, **config: Any) -> list[Any]:
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return [getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**config)), byte_tokenizer()]


def _chatting(family: str, **config: Any) -> list[Any]:
    """A language model with a chat template that knows of no media."""
    model, words = _language(family, **config)
    words.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return [model, words]


def _llava() -> list[Any]:
    words = byte_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**_IMAGE, "num_hidden_layers": 3}),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    processor = transformers.LlavaProcessor(
        _cropped("CLIPImageProcessor"), words, patch_size=8, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    return [transformers.LlavaForConditionalGeneration(config), processor]


_GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **_ENDS}
_OPT = {
    "vocab_size": 300, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 48,
    "max_position_embeddings": 512, "num_attention_heads": 4, **_ENDS,
}  # fmt: skip
CHECKPOINTS: dict[str, Callable[[], list[Any]]] = {
    "clip": _clip,
    "siglip": lambda: [
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_IMAGE)), _stretched("SiglipImageProcessor")
    ],
    "vit": lambda: [transformers.ViTModel(transformers.ViTConfig(**_IMAGE)), _stretched("ViTImageProcessor")],
    "dinov2": _dinov2,
    "resnet": _resnet,
    "whisper": _whisper,
    "qwen2_audio": _qwen2_audio,
    "wav2vec2": lambda: _wave("Wav2Vec2"),
    "hubert": lambda: _wave("Hubert"),
    "videomae": lambda: _video("VideoMAE"),
    "timesformer": lambda: _video("Timesformer"),
    "patchtst": _patchtst,
    "llama": lambda: _language("Llama", **_TEXT),
    "mistral": lambda: _language("Mistral", **{**_TEXT, "sliding_window": 24}),
    "qwen2": lambda: _chatting("Qwen2", **{**_TEXT, "tie_word_embeddings": True}),
    "qwen3": lambda: _language("Qwen3", **{**_TEXT, "head_dim": 16}),
    "gpt2": lambda: _language("GPT2", **_GPT2),
    "opt": lambda: _language("OPT", **_OPT),
    "olmo2": lambda: [
        language_model("olmo2", 300, hidden_size=32, max_position_embeddings=512, **_ENDS), byte_tokenizer()
    ],
    "beit": lambda: [tower("beit")],
    "llava": _llava,
}  # fmt: skip
"""Model, and tokenizers or processors, by name. All are 32 wide, but for the texts of CLIP and what has an adapter."""
ADAPTED = {"olmo2", "beit"}
"""Those that have no native form here."""


def write(name: str, folder: Path) -> Path:
    """A checkpoint folder, its weights telling and always the same."""
    torch.manual_seed(0)
    model, *extras = CHECKPOINTS[name]()
    save_reference(model if name in ADAPTED else noisy(model), folder, *extras)
    if name == "beit":
        _stretched("ViTImageProcessor").save_pretrained(folder)
        config = json.loads((folder / "preprocessor_config.json").read_text())
        config["size"] = {"height": 16, "width": 16}
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def write_media(folder: Path, num: int = 6) -> Path:
    """``MODALITY.jsonl`` of conversations and of views, ``num`` samples each, beside their media."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    kinds = {"image": ({}, "png"), "audio": ({}, "wav"), "video": ({}, "gif"), "sensor": ({"rate_hz": 50}, "npy")}
    for modality, (details, suffix) in kinds.items():
        turns, views = [], []
        for index in range(num):
            name, word = f"{index}.{suffix}", ("red", "green", "blue")[index % 3]
            _write_medium(modality, folder / name, rng)
            medium = {"path": name, **details}
            content = [{"type": modality, **medium}, {"type": "text", "text": f"What is it, number {index}?"}]
            answer = {"role": "assistant", "content": f"a {word} one"}
            turns.append({"id": f"{modality} {index}", "messages": [{"role": "user", "content": content}, answer]})
            views.append({"id": f"{modality} {index}", "views": {modality: medium, "text": f"a {word} dog"}})
        for file, lines in ((f"{modality}.jsonl", turns), (f"{modality}-views.jsonl", views)):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def _write_medium(modality: str, path: Path, rng: np.random.Generator) -> None:
    if modality == "image":
        PIL.Image.fromarray(rng.integers(0, 256, (33, 41, 3), dtype=np.uint8)).save(path)
    elif modality == "audio":
        soundfile.write(path, rng.uniform(-0.5, 0.5, int(rng.integers(1600, 4800))), 16_000)
    elif modality == "video":
        frames = [PIL.Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(6)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    else:
        np.save(path, rng.normal(size=(int(rng.integers(9, 17)), 2)).astype(np.float32))
