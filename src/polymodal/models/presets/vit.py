"""ViT checkpoints (``model_type: vit``) as an image stream."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.presets.architecture import Architecture, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

_PARTS = {
    "attention_norm": "layernorm_before",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.out_proj": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream without a backbone: features and the class token's state."""
    config = configs.config
    require(config, "vit", num_channels=3, qkv_bias=True, encoder_stride=16)
    encoder = {
        "use": "vit",
        "image_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 16),
        "width": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "mlp_dim": config.get("intermediate_size", 3072),
        "activation": config.get("hidden_act", "gelu"),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "pool": "cls",
    }
    return {
        "streams": {
            "image": {"modality": "image", "encoder": encoder, "reader": _reader(configs.preprocessor, encoder)}
        },
        "backbone": "none",
        "heads": {},
    }


def _reader(preprocessor: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "use": "image",
        "size_px": encoder["image_size"],
        "mean": preprocessor.get("image_mean", (0.5, 0.5, 0.5)),
        "std": preprocessor.get("image_std", (0.5, 0.5, 0.5)),
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``ViTModel``; of the wrapping classes where the stored names begin with ``vit.``."""
    trunk = "streams.image.encoder.trunk."
    table = NameTable(
        [
            Rule(trunk + "patch_embed.{p}", "embeddings.patch_embeddings.projection.{p}"),
            Rule(trunk + "cls_token", "embeddings.cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(
                trunk + "learned_positions.weight",
                "embeddings.position_embeddings",
                Reshape((-1, model.streams["image"].encoder.width), (1, -1, model.streams["image"].encoder.width)),
            ),
            Rule(trunk + "transformer.final_norm.{p}", "layernorm.{p}"),
            *block_rules(trunk + "transformer.blocks", "encoder.layer", _PARTS),
        ],
        ignored=("pooler.{rest}", "classifier.{rest}"),
    )
    return table.below("vit.") if any(name.startswith("vit.") for name in stored) else table


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of ``ViTModel``."""
    streams = list(model.streams.values())
    encoder = streams[0].encoder if len(streams) == 1 else None
    if not isinstance(encoder, VitConfig):
        raise ConfigError("vit: found a model of other parts, expected one image stream with the encoder 'vit'")
    reader = streams[0].reader
    config = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_dim or 4 * encoder.width,
        "hidden_act": encoder.activation,
        "layer_norm_eps": encoder.norm_eps,
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": reader.size_px, "width": reader.size_px},
        "image_mean": list(reader.mean),
        "image_std": list(reader.std),
    }
    return {"config.json": config, "preprocessor_config.json": preprocessor}


VIT = Architecture("vit", ("vit",), "ViT, arXiv 2010.11929, section 3.1", to_model=to_model, names=names, to_hub=to_hub)
"""See the module."""
