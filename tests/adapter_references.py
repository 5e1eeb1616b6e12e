"""Small random models of the reference library, as checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

W = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = {**W, "num_key_value_heads": 2, "max_position_embeddings": 256}
SMALL_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 256}
SLIDING = {**GROUPED, "head_dim": 4, "sliding_window": 4}

LANGUAGE: dict[str, dict[str, Any]] = {
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "granite": {**GROUPED, "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "gemma2": {
        **SLIDING,
        "final_logit_softcapping": 0.5,
        "attn_logit_softcapping": 1.0,
        "query_pre_attn_scalar": 4,
        "head_dim": 4,
    },
    "gpt2": SMALL_GPT,
    "opt": {**W, "word_embed_proj_dim": 8, "ffn_dim": 24, "max_position_embeddings": 256},
    "gpt_neox": {**W, "max_position_embeddings": 256},
    "phi3": {**GROUPED, "pad_token_id": 0},
    "olmo2": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": None},
    "stablelm": GROUPED,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
"""Language models by ``model_type``: scaled and soft-capped heads, ties, every kind of position, sliding windows,
experts, recurrence."""

_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_WAVE = {
    **_VIT,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embedding_groups": 2,
}

_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
_CONVNEXT = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
_PVT = {"image_size": 32, "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
_AST = {**_VIT, "max_length": 24, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
_PATCHTST = {
    "num_input_channels": 3,
    "context_length": 16,
    "patch_length": 4,
    "patch_stride": 4,
    "d_model": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 24,
}
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "swin": ("image", _SWIN, {}),
    "convnext": ("image", _CONVNEXT, {"size_px": 16}),
    "resnet": ("image", _RESNET, {"size_px": 16}),
    "beit": ("image", {**_VIT, "image_size": 16, "patch_size": 8}, {"skip": 1}),
    "pvt_v2": ("image", _PVT, {}),
    "siglip2_vision_model": ("image", {**_VIT, "patch_size": 4, "num_patches": 16}, {}),
    "data2vec-audio": ("audio", {**_WAVE, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 3}, {}),
    "wavlm": ("audio", {**_WAVE, "num_conv_pos_embeddings": 4}, {}),
    "audio-spectrogram-transformer": ("audio", _AST, {"skip": 2}),
    "vivit": ("video", {**_VIT, "image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8]}, {"skip": 1}),
    "patchtst": ("sensor", _PATCHTST, {}),
    "roberta": ("text", {**_VIT, "vocab_size": 64}, {"layer": -2, "pool": "first"}),
}
"""Towers by ``model_type``: modality, config, and options of the encoder."""


@torch.no_grad()
def noisy(model: Any, seed: int = 1) -> Any:
    """Move every parameter, so that no bias is 0 and no gain is 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def config_of(kind: str, data: dict[str, Any]) -> Any:
    """The library's config object."""
    return transformers.CONFIG_MAPPING[kind](**data)


def language_model(kind: str, vocab_size: int = 64, **more: Any) -> nn.Module:
    """A random causal language model."""
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    data = {**LANGUAGE[kind], "vocab_size": vocab_size, **ids, **more}
    return noisy(transformers.AutoModelForCausalLM.from_config(config_of(kind, data)))


def tower(kind: str) -> nn.Module:
    """A random tower."""
    torch.manual_seed(0)
    return noisy(transformers.AutoModel.from_config(config_of(kind, TOWERS[kind][1])))


def save(model: Any, folder: Path) -> Path:
    """A checkpoint folder."""
    model.save_pretrained(folder)
    return folder
