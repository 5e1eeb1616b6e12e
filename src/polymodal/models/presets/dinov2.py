"""DINOv2 checkpoints, with and without registers (``model_type: dinov2``, ``dinov2_with_registers``)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.image_reader import IMAGENET_MEAN, IMAGENET_STD, image_preprocessor, image_reader
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.presets.towers import grid_fields
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule, Slice

_PARTS = {
    "attention_norm": "norm1",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.out_proj": "attention.output.dense",
    "mlp_norm": "norm2",
}
_REGISTERS = "dinov2_with_registers"
_CLASSES = {"dinov2": "Dinov2", _REGISTERS: "Dinov2WithRegisters"}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream whose positions are interpolated to the size that the preprocessing gives."""
    config, kind = configs.config, configs.model_type
    require(config, kind, num_channels=3, qkv_bias=True, drop_path_rate=0.0)
    require(config, kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    has_registers = kind == _REGISTERS
    patch, trained = config.get("patch_size", 16 if has_registers else 14), config.get("image_size", 224)
    reader = image_reader(configs.preprocessor, trained, "BitImageProcessor")
    is_gated, width = config.get("use_swiglu_ffn", False), config.get("hidden_size", 768)
    is_interpolated = reader["size_px"] // patch != trained // patch
    encoder = {
        "use": "vit",
        **grid_fields(reader["size_px"], patch),
        "width": width,
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "mlp_dim": _hidden(width, config.get("mlp_ratio", 4), is_gated),
        "activation": "silu" if is_gated else activation(config.get("hidden_act", "gelu")),
        "norm_eps": config.get("layer_norm_eps", 1e-6),
        "gated": is_gated,
        "layer_scale": config.get("layerscale_value", 1.0),
        "pool": "cls",
        "mask_token": has_registers or config.get("use_mask_token", True),
        "registers": config.get("num_register_tokens", 4) if has_registers else 0,
        "position_grid": trained // patch if is_interpolated else None,
        "position_antialias": has_registers and is_interpolated,
    }
    stream = {"modality": "image", "encoder": encoder, "reader": reader}
    heads: dict[str, Any] = {}
    if f"{_CLASSES[kind]}ForImageClassification" in configs.classes:
        head = {"use": "class", "stream": "image", "take": "pooled_mean", "classes": class_names(config)}
        heads["class"] = head
    return {"streams": {"image": stream}, "backbone": "none", "heads": heads}


def _hidden(width: int, ratio: float, is_gated: bool) -> int:
    """Hidden width of the MLPs; a gated one has two thirds of it, up to a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if is_gated else hidden


def _ratio(encoder: VitConfig) -> float:
    """A ratio of which :func:`_hidden` makes the encoder's MLPs.

    Raises:
        ConfigError: if there is none.
    """
    hidden = encoder.mlp_dim or 4 * encoder.width
    exact = hidden / encoder.width * (1.5 if encoder.gated else 1.0)
    for ratio in (round(exact), exact):
        if _hidden(encoder.width, ratio, encoder.gated) == hidden:
            return ratio
    raise ConfigError(f"dinov2: found mlp_dim {hidden}, which no mlp_ratio of width {encoder.width} gives")


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``Dinov2Model``, below ``dinov2.`` (or ``dinov2_with_registers.``) in the classes that wrap it."""
    trunk, encoder = "streams.image.encoder.trunk.", _encoder(model)
    width, blocks = encoder.width, trunk + "transformer.blocks"
    mlp = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
    table = NameTable(
        [
            Rule(trunk + "patch_embed.{p}", "embeddings.patch_embeddings.projection.{p}"),
            Rule(trunk + "cls_token", "embeddings.cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(trunk + "mask_token", "embeddings.mask_token", Reshape((-1,), (1, -1))),
            Rule(trunk + "registers", "embeddings.register_tokens", Reshape((-1, width), (1, -1, width))),
            Rule(
                trunk + "learned_positions.weight",
                "embeddings.position_embeddings",
                Reshape((-1, width), (1, -1, width)),
            ),
            Rule(trunk + "transformer.final_norm.{p}", "layernorm.{p}"),
            Rule(blocks + ".{i}.attention_scale", "encoder.layer.{i}.layer_scale1.lambda1"),
            Rule(blocks + ".{i}.mlp_scale", "encoder.layer.{i}.layer_scale2.lambda1"),
            *(_gated_rules(blocks) if encoder.gated else block_rules(blocks, "encoder.layer", mlp)),
            *block_rules(blocks, "encoder.layer", _PARTS),
        ]
    )
    prefix = f"{_REGISTERS if encoder.registers else 'dinov2'}."
    is_wrapped = bool(model.heads) or any(name.startswith(prefix) for name in stored)
    table = table.below(prefix) if is_wrapped else table
    return table + NameTable([Rule("heads.class.{p}", "classifier.{p}")])


def _gated_rules(blocks: str) -> list[Rule]:
    """Gate and input projection are stored as one."""
    return [
        Rule(f"{blocks}.{{i}}.mlp.gate_proj.{{p}}", "encoder.layer.{i}.mlp.weights_in.{p}", Slice(0, 2)),
        Rule(f"{blocks}.{{i}}.mlp.up_proj.{{p}}", "encoder.layer.{i}.mlp.weights_in.{p}", Slice(1, 2)),
        Rule(f"{blocks}.{{i}}.mlp.down_proj.{{p}}", "encoder.layer.{i}.mlp.weights_out.{p}"),
    ]


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    encoder, heads = _encoder(model), list(model.heads.values())
    kind = _REGISTERS if encoder.registers else "dinov2"
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [f"{_CLASSES[kind]}Model"],
        "image_size": (encoder.position_grid or encoder.grid) * encoder.patch_size,
        "patch_size": encoder.patch_size,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "mlp_ratio": _ratio(encoder),
        "hidden_act": "gelu" if encoder.gated else hub_activation(encoder.activation),
        "layer_norm_eps": encoder.norm_eps,
        "use_swiglu_ffn": encoder.gated,
        "layerscale_value": encoder.layer_scale,
    }
    config |= (
        {"num_register_tokens": encoder.registers} if encoder.registers else {"use_mask_token": encoder.mask_token}
    )
    if heads:
        config["architectures"] = [f"{_CLASSES[kind]}ForImageClassification"]
        config |= label_config(getattr(heads[0], "classes", ()))
    processor = image_preprocessor(model.streams["image"].reader, "BitImageProcessor")
    return {"config.json": config, "preprocessor_config.json": processor}


def _encoder(model: ModelConfig) -> VitConfig:
    encoder = model.streams["image"].encoder if list(model.streams) == ["image"] else None
    fits = isinstance(encoder, VitConfig) and encoder.layer_scale is not None
    if not isinstance(encoder, VitConfig) or not fits or any(head.use != "class" for head in model.heads.values()):
        raise ConfigError(
            "dinov2: found a model of other parts, expected one image stream with the encoder 'vit' and a layer_scale, "
            "and no head but 'class'"
        )
    return encoder


_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}


def _sizes(kind: str, suffix: str, parameters: Mapping[str, int]) -> dict[str, Size]:
    shapes: dict[str, dict[str, Any]] = {"small": _SMALL, "base": {}, "large": _LARGE, "giant": _GIANT}
    shared = {"model_type": kind, "architectures": [f"{_CLASSES[kind]}Model"], "image_size": 518, "patch_size": 14}
    return {
        f"dinov2-{suffix}{name}": Size({**shared, **shapes[name]}, count, _PREPROCESSOR)
        for name, count in parameters.items()
    }


DINOV2 = Architecture(
    "dinov2",
    ("dinov2", _REGISTERS),
    "DINOv2, arXiv 2304.07193, section 5; registers: arXiv 2309.16588, section 2.2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        **_sizes("dinov2", "", {"small": 22_056_576, "base": 86_580_480, "large": 304_368_640, "giant": 1_136_480_768}),
        **_sizes(
            _REGISTERS,
            "with-registers-",
            {"small": 22_058_112, "base": 86_583_552, "large": 304_372_736, "giant": 1_136_486_912},
        ),
    },
)
"""See the module."""
