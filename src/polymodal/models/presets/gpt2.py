"""GPT-2 checkpoints (``model_type: gpt2``): fused projections, stored ``[inputs, outputs]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.presets.activations import activation
from polymodal.models.presets.architecture import Size, require
from polymodal.models.presets.language import Language
from polymodal.models.weights import TRANSPOSED, NameTable, Rule, Slice

_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}


def _backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "gpt2", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    value = {**_DEFAULTS, **config}
    return {
        "use": "decoder",
        "max_tokens": value["n_positions"],
        "positions": "learned",
        "transformer": {
            "width": value["n_embd"],
            "depth": value["n_layer"],
            "heads": value["n_head"],
            "mlp_dim": value["n_inner"],
            "norm_eps": value["layer_norm_epsilon"],
            "activation": activation(value["activation_function"]),
        },
    }


def _config(backbone: DecoderConfig, rows: int) -> dict[str, Any]:
    stack = backbone.transformer
    if backbone.positions != "learned" or stack.norm != "layer":
        raise ConfigError(
            f"gpt2: found positions {backbone.positions!r} and the norm {stack.norm!r}, expected learned positions and "
            "layer norms"
        )
    names = {"gelu_tanh": "gelu_new", "quick_gelu": "quick_gelu", "gelu": "gelu", "silu": "silu", "relu": "relu"}
    return {
        "vocab_size": rows,
        "n_positions": backbone.max_tokens,
        "n_embd": stack.width,
        "n_layer": stack.depth,
        "n_head": stack.heads,
        "n_inner": stack.mlp_dim,
        "activation_function": names[stack.activation],
        "layer_norm_epsilon": stack.norm_eps,
    }


def _names(backbone: DecoderConfig, prefix: str) -> NameTable:
    ours, stored = "backbone.transformer.blocks.{i}.", prefix + "h.{i}."
    fused = [
        Rule(f"{ours}attention.{name}_proj.{{p}}", stored + "attn.c_attn.{p}", Slice(place, 3, transposed=True))
        for place, name in enumerate("qkv")
    ]
    return NameTable(
        [
            Rule("backbone.embed_tokens.weight", prefix + "wte.weight"),
            Rule("backbone.embed_positions.weight", prefix + "wpe.weight"),
            Rule("backbone.transformer.final_norm.{p}", prefix + "ln_f.{p}"),
            *fused,
            Rule(ours + "attention.out_proj.{p}", stored + "attn.c_proj.{p}", TRANSPOSED),
            Rule(ours + "mlp.up_proj.{p}", stored + "mlp.c_fc.{p}", TRANSPOSED),
            Rule(ours + "mlp.down_proj.{p}", stored + "mlp.c_proj.{p}", TRANSPOSED),
            Rule(ours + "attention_norm.{p}", stored + "ln_1.{p}"),
            Rule(ours + "mlp_norm.{p}", stored + "ln_2.{p}"),
        ],
        ignored=(stored + "attn.bias", stored + "attn.masked_bias"),
    )


def _size(width: int, depth: int, heads: int, parameters: int) -> Size:
    own = {"n_embd": width, "n_layer": depth, "n_head": heads}
    return Size({"model_type": "gpt2", **_DEFAULTS, **own}, parameters)


GPT2 = Language(
    "gpt2",
    ("gpt2",),
    "GPT-2, Radford et al. 2019, section 2.3",
    _backbone,
    _config,
    _names,
    body="transformer.",
    kind="GPT2LMHeadModel",
    tied=True,
    rows=50257,
    sizes={
        "gpt2": _size(768, 12, 12, 124_439_808),
        "gpt2-medium": _size(1024, 24, 16, 354_823_168),
        "gpt2-large": _size(1280, 36, 20, 774_030_080),
        "gpt2-xl": _size(1600, 48, 25, 1_557_611_200),
    },
)
