"""Qwen2 and Qwen3 checkpoints (``model_type: qwen2``, ``qwen3``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.presets.architecture import Size, require
from polymodal.models.presets.language import Language
from polymodal.models.presets.llama import llama_config, llama_like, llama_names

_QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
_QWEN3 = {**_QWEN2, "head_dim": 128}


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "qwen2", use_sliding_window=False)
    data = llama_like(config, "qwen2", _QWEN2)
    data["transformer"]["qkv_bias"] = True
    return data


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "qwen3", use_sliding_window=False)
    data = llama_like(config, "qwen3", _QWEN3)
    data["transformer"]["qk_norm"] = True
    return data


def _config(backbone: DecoderConfig, rows: int) -> dict[str, Any]:
    return {**llama_config(backbone, rows), "use_sliding_window": False}


def _size(kind: str, parameters: int, values: tuple[int, int, int, int, int], **config: Any) -> Size:
    """A size from (width, MLP width, depth, heads, key-value heads)."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    base = _QWEN2 if kind == "qwen2" else {**_QWEN3, "max_position_embeddings": 40960}
    own = dict(zip(keys, values, strict=True))
    return Size({"model_type": kind, **base, "rope_theta": 1_000_000.0, **own, **config}, parameters)


_TIED = {"tie_word_embeddings": True}

QWEN2 = Language(
    "qwen2",
    ("qwen2",),
    "Qwen2, arXiv 2407.10671, section 2.2",
    _qwen2,
    _config,
    llama_names,
    body="model.",
    kind="Qwen2ForCausalLM",
    tied=False,
    rows=151936,
    sizes={
        "qwen2-0.5b": _size("qwen2", 494_032_768, (896, 4864, 24, 14, 2), max_position_embeddings=131072, **_TIED),
        "qwen2-1.5b": _size("qwen2", 1_543_714_304, (1536, 8960, 28, 12, 2), max_position_embeddings=131072, **_TIED),
        "qwen2-7b": _size(
            "qwen2", 7_615_616_512, (3584, 18944, 28, 28, 4), max_position_embeddings=131072, vocab_size=152064
        ),
    },
)
QWEN3 = Language(
    "qwen3",
    ("qwen3",),
    "Qwen3, arXiv 2505.09388, section 2",
    _qwen3,
    _config,
    llama_names,
    body="model.",
    kind="Qwen3ForCausalLM",
    tied=False,
    rows=151936,
    sizes={
        "qwen3-0.6b": _size("qwen3", 596_049_920, (1024, 3072, 28, 16, 8), **_TIED),
        "qwen3-1.7b": _size("qwen3", 1_720_574_976, (2048, 6144, 28, 16, 8), **_TIED),
        "qwen3-4b": _size("qwen3", 4_022_468_096, (2560, 9728, 36, 32, 8), **_TIED),
        "qwen3-8b": _size("qwen3", 8_190_735_360, (4096, 12288, 36, 32, 8)),
    },
)
