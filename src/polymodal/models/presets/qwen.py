"""Qwen2 and Qwen3 checkpoints (``model_type: qwen2``, ``qwen3``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.presets.architecture import Size
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
    data = llama_like(config, "qwen2", _QWEN2)
    data["transformer"] |= {"qkv_bias": True, **_window(config, "qwen2", data["transformer"]["depth"])}
    return data


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    data = llama_like(config, "qwen3", _QWEN3)
    data["transformer"] |= {"qk_norm": True, **_window(config, "qwen3", data["transformer"]["depth"])}
    return data


def _window(config: Mapping[str, Any], where: str, depth: int) -> dict[str, int]:
    """The window of the later blocks, where the checkpoint uses it.

    Raises:
        ConfigError: if blocks with and without a window alternate.
    """
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 4096) is None:
        return {}
    first = config.get("max_window_layers", 28)
    full, sliding = "full_attention", "sliding_attention"
    kinds = config.get("layer_types") or [full] * min(first, depth) + [sliding] * (depth - first)
    wide = kinds.count(full)
    if kinds != [full] * wide + [sliding] * (depth - wide):
        raise ConfigError(
            f"{where}: found layer_types {kinds}, expected full_attention first and sliding_attention after it; "
            "use the adapter, {use: transformers, from: ...}"
        )
    return {"window": config.get("sliding_window", 4096), "window_from": wide} if wide < depth else {}


def _config(backbone: DecoderConfig, rows: int) -> dict[str, Any]:
    stack = backbone.transformer
    told: dict[str, Any] = {"use_sliding_window": stack.window is not None}
    if stack.window is not None:
        told |= {"sliding_window": stack.window, "max_window_layers": stack.window_from}
    return {**llama_config(backbone, rows), **told}


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
