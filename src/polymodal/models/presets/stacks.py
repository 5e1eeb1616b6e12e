"""A transformer's sizes as most ``config.json`` name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.models.encoders.base import TransformerEncoderConfig
from polymodal.models.layers import TransformerConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import require


def stack_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of one of our transformers.

    Args:
        config: sizes, the reference library's defaults filled in.
        where: the architecture, for messages.
    """
    require(config, where, attention_dropout=0.0)
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "activation": activation(config["hidden_act"]),
        "norm_eps": config["layer_norm_eps"],
    }


def stack_config(stack: TransformerEncoderConfig | TransformerConfig) -> dict[str, Any]:
    """The inverse of :func:`stack_fields`."""
    return {
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.mlp_dim or 4 * stack.width,
        "hidden_act": hub_activation(stack.activation),
        "layer_norm_eps": stack.norm_eps,
    }
