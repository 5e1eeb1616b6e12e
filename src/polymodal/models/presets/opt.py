"""OPT checkpoints (``model_type: opt``): learned positions from row 2 on; 350m: norms last, narrow embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Size, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.language import Language
from polymodal.models.weights import NameTable, Rule

_DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "num_attention_heads": 12,
    "activation_function": "relu",
}
_PARTS = {
    **{f"attention.{name}_proj": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
    "attention_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
_OFFSET = 2


def _backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "opt", enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    value = {**_DEFAULTS, **config}
    width, outer = value["hidden_size"], value.get("word_embed_proj_dim")
    return {
        "use": "decoder",
        "max_tokens": value["max_position_embeddings"],
        "positions": "learned",
        "position_offset": _OFFSET,
        "embed_width": outer if outer not in (None, width) else None,
        "transformer": {
            "width": width,
            "depth": value["num_hidden_layers"],
            "heads": value["num_attention_heads"],
            "mlp_dim": value["ffn_dim"],
            "activation": activation(value["activation_function"]),
            "pre_norm": value["do_layer_norm_before"],
            "final_norm": value["do_layer_norm_before"],
        },
    }


def _config(backbone: DecoderConfig, rows: int) -> dict[str, Any]:
    stack = backbone.transformer
    if backbone.position_offset != _OFFSET:
        raise ConfigError(
            f"opt: found positions {backbone.positions!r} with offset {backbone.position_offset}, expected learned "
            f"positions with offset {_OFFSET}"
        )
    return {
        "vocab_size": rows,
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "ffn_dim": stack.mlp_dim or 4 * stack.width,
        "max_position_embeddings": backbone.max_tokens,
        "do_layer_norm_before": stack.pre_norm,
        "num_attention_heads": stack.heads,
        "activation_function": hub_activation(stack.activation),
        "word_embed_proj_dim": backbone.embed_width or stack.width,
    }


def _names(backbone: DecoderConfig, prefix: str) -> NameTable:
    return NameTable(
        [
            Rule("backbone.embed_tokens.weight", prefix + "embed_tokens.weight"),
            Rule("backbone.embed_positions.weight", prefix + "embed_positions.weight"),
            Rule("backbone.in_proj.weight", prefix + "project_in.weight"),
            Rule("backbone.out_proj.weight", prefix + "project_out.weight"),
            Rule("backbone.transformer.final_norm.{p}", prefix + "final_layer_norm.{p}"),
            *block_rules("backbone.transformer.blocks", prefix + "layers", _PARTS),
        ]
    )


def _size(width: int, depth: int, heads: int, parameters: int, **config: Any) -> Size:
    own = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "word_embed_proj_dim": width,
    }
    return Size({"model_type": "opt", **_DEFAULTS, **own, **config}, parameters)


OPT = Language(
    "opt",
    ("opt",),
    "OPT, arXiv 2205.01068, section 2.1",
    _backbone,
    _config,
    _names,
    body="model.decoder.",
    kind="OPTForCausalLM",
    tied=True,
    rows=50272,
    sizes={
        "opt-125m": _size(768, 12, 12, 125_239_296),
        "opt-350m": _size(1024, 24, 16, 331_196_416, do_layer_norm_before=False, word_embed_proj_dim=512),
        "opt-1.3b": _size(2048, 24, 32, 1_315_758_080),
        "opt-2.7b": _size(2560, 32, 32, 2_651_596_800),
        "opt-6.7b": _size(4096, 32, 32, 6_658_473_984),
    },
)
