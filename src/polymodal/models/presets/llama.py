"""Llama, Vicuna and Mistral checkpoints (``model_type: llama``, ``mistral``); the base of Qwen's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.layers.transformer import TransformerConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Size, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.language import Language
from polymodal.models.weights import NameTable, Rule

_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


_FACTOR = {"factor": "factor"}
_ORIGINAL = {**_FACTOR, "original_max_tokens": "original_max_position_embeddings"}
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "linear": _FACTOR,
    "llama3": {**_ORIGINAL, "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {
        **_ORIGINAL,
        **{key: key for key in ("attention_factor", "beta_fast", "beta_slow", "truncate")},
    },
    "longrope": {
        **_ORIGINAL,
        "short_factors": "short_factor",
        "long_factors": "long_factor",
        "attention_factor": "attention_factor",
    },
}
"""Per kind of stretching, our name of each value and the hub's."""


def llama_like(config: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Data of a decoder backbone of Llama's kind.

    Args:
        config: ``config.json``.
        where: the family, for messages.
        defaults: values of absent keys; those of the reference library.
    """
    value = {**defaults, **config}
    require(value, where, attention_bias=False, mlp_bias=False, attention_dropout=0.0, partial_rotary_factor=1.0)
    theta, scaling = read_rope(value, where)
    heads = value["num_attention_heads"]
    return {
        "use": "decoder",
        "max_tokens": value["max_position_embeddings"],
        "positions": "rope",
        "transformer": {
            "width": value["hidden_size"],
            "depth": value["num_hidden_layers"],
            "heads": heads,
            "kv_heads": value.get("num_key_value_heads") or heads,
            "head_dim": value.get("head_dim"),
            "mlp_dim": value["intermediate_size"],
            "norm": "rms",
            "norm_eps": value["rms_norm_eps"],
            "activation": activation(value["hidden_act"]),
            "gated": True,
            "bias": False,
            "rope_theta": theta,
            "rope_scaling": scaling,
        },
    }


def llama_config(backbone: DecoderConfig, rows: int) -> dict[str, Any]:
    """Config data of a decoder of Llama's kind."""
    stack = backbone.transformer
    if backbone.positions != "rope" or stack.rope_theta is None:
        raise ConfigError(f"llama: found positions {backbone.positions!r}, expected rotary codes")
    return {
        "vocab_size": rows,
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp_dim or 4 * stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.num_kv_heads,
        "head_dim": stack.size_of_head,
        "hidden_act": hub_activation(stack.activation),
        "max_position_embeddings": backbone.max_tokens,
        "rms_norm_eps": stack.norm_eps,
        **write_rope(stack),
    }


def llama_names(backbone: DecoderConfig, prefix: str) -> NameTable:
    """Names of the body, stored below ``prefix``."""
    return NameTable(
        [
            Rule("backbone.embed_tokens.weight", prefix + "embed_tokens.weight"),
            Rule("backbone.transformer.final_norm.{p}", prefix + "norm.{p}"),
            *block_rules("backbone.transformer.blocks", prefix + "layers", _PARTS),
        ],
        ignored=(prefix + "layers.{i}.self_attn.rotary_emb.inv_freq", prefix + "rotary_emb.inv_freq"),
    )


def read_rope(config: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Base and stretching of the rotary code, from either of the two layouts that configs have.

    Raises:
        ConfigError: for a kind of stretching that is not built.
    """
    told = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    kind = told.get("rope_type", told.get("type", "default"))
    theta = float(told.get("rope_theta", config.get("rope_theta", 10_000.0)))
    if kind == "default":
        return theta, None
    if kind not in _ROPE_KEYS:
        raise ConfigError(
            f"{where}: found rope_type {kind!r}, expected default, {', '.join(_ROPE_KEYS)}: there is no native form "
            "of it; use the adapter, {use: transformers, from: ...}"
        )
    longest = config.get("max_position_embeddings", 0)
    original = told.get("original_max_position_embeddings", config.get("original_max_position_embeddings", longest))
    told = {**told, "original_max_position_embeddings": original}
    if told.get("factor") is None:
        told["factor"] = longest / original
    if kind == "yarn" and told.get("attention_factor") is None and told.get("mscale") and told.get("mscale_all_dim"):
        wanted, whole = (0.1 * told[key] * math.log(told["factor"]) + 1.0 for key in ("mscale", "mscale_all_dim"))
        told["attention_factor"] = wanted / whole
    given = {ours: told[hub] for ours, hub in _ROPE_KEYS[kind].items() if told.get(hub) is not None}
    return theta, {"kind": kind, **given}


def write_rope(stack: TransformerConfig) -> dict[str, Any]:
    """The rotary code in the layout that every version of the reference library reads."""
    scaling = stack.rope_scaling
    if scaling is None:
        return {"rope_theta": stack.rope_theta}
    told = {hub: getattr(scaling, ours) for ours, hub in _ROPE_KEYS[scaling.kind].items()}
    told = {hub: list(value) if isinstance(value, tuple) else value for hub, value in told.items() if value is not None}
    return {"rope_theta": stack.rope_theta, "rope_scaling": {"rope_type": scaling.kind, **told}}


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_MISTRAL = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "llama", pretraining_tp=1)
    return llama_like(config, "llama", _LLAMA)


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    data = llama_like(config, "mistral", _MISTRAL)
    data["transformer"]["window"] = {**_MISTRAL, **config}["sliding_window"]
    return data


def _mistral_config(backbone: DecoderConfig, rows: int) -> dict[str, Any]:
    return {**llama_config(backbone, rows), "sliding_window": backbone.transformer.window}


_L2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_L3 = {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_L31 = {
    **_L3,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}


def _size(kind: str, parameters: int, config: Mapping[str, Any]) -> Size:
    return Size({"model_type": kind, **(_LLAMA if kind == "llama" else _MISTRAL), **config}, parameters)


LLAMA = Language(
    "llama",
    ("llama",),
    "Llama, arXiv 2302.13971, section 2.2; Llama 3, arXiv 2407.21783, section 3.2",
    _llama,
    llama_config,
    llama_names,
    body="model.",
    kind="LlamaForCausalLM",
    tied=False,
    rows=32000,
    sizes={
        "llama-7b": _size("llama", 6_738_415_616, {}),
        "vicuna-7b-v1.5": _size("llama", 6_738_415_616, _L2),
        "llama-13b": _size("llama", 13_015_864_320, _13B),
        "vicuna-13b-v1.5": _size("llama", 13_015_864_320, {**_13B, **_L2}),
        "llama-3-8b": _size("llama", 8_030_261_248, _L3),
        "llama-3.1-8b": _size("llama", 8_030_261_248, _L31),
    },
)
MISTRAL = Language(
    "mistral",
    ("mistral",),
    "Mistral 7B, arXiv 2310.06825, section 2",
    _mistral,
    _mistral_config,
    llama_names,
    body="model.",
    kind="MistralForCausalLM",
    tied=False,
    rows=32000,
    sizes={
        "mistral-7b-v0.1": _size("mistral", 7_241_732_096, {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5})
    },
)
