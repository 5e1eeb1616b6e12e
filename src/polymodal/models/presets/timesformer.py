"""TimeSformer checkpoints (``model_type: timesformer``): encoder and classifier."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.space_time import SpaceTimeConfig
from polymodal.models.presets.activations import activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.presets.stacks import stack_config
from polymodal.models.presets.video_reader import frame_processor, video_reader
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule, Slice

_PARTS = {
    "time_norm": "temporal_layernorm",
    "time_attention.out_proj": "temporal_attention.output.dense",
    "time_proj": "temporal_dense",
    "attention_norm": "layernorm_before",
    "attention.out_proj": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
}
_CLASSIFIER = "TimesformerForVideoClassification"
_ATTENTIONS = {"divided_space_time": "divided", "joint_space_time": "joint"}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """A video stream without a backbone; a ``class`` head where the checkpoint has one."""
    config = configs.config
    require(config, "timesformer", num_channels=3, qkv_bias=True, attention_type=tuple(_ATTENTIONS))
    encoder = {
        "use": "space_time",
        "attention": _ATTENTIONS[config.get("attention_type", "divided_space_time")],
        "image_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 16),
        "num_frames": config.get("num_frames", 8),
        "width": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "mlp_dim": config.get("intermediate_size", 3072),
        "activation": activation(config.get("hidden_act", "gelu")),
        "norm_eps": config.get("layer_norm_eps", 1e-6),
    }
    reader = video_reader(configs.preprocessor, encoder["image_size"], encoder["num_frames"], "timesformer")
    heads = {}
    if _CLASSIFIER in configs.classes:
        heads["class"] = {"use": "class", "stream": "video", "classes": class_names(config)}
    stream = {"modality": "video", "encoder": encoder, "reader": reader}
    return {"streams": {"video": stream}, "backbone": "none", "heads": heads}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``TimesformerModel``, below ``timesformer.`` in the class that wraps it."""
    width = _encoder(model).width
    ours = "streams.video.encoder."
    table = NameTable(
        [
            Rule(ours + "patch_embed.{p}", "embeddings.patch_embeddings.projection.{p}"),
            Rule(ours + "cls_token", "embeddings.cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(
                ours + "positions.weight",
                "embeddings.position_embeddings",
                Reshape((-1, width), (1, -1, width)),
            ),
            Rule(
                ours + "time_positions.weight",
                "embeddings.time_embeddings",
                Reshape((-1, width), (1, -1, width)),
            ),
            Rule(ours + "final_norm.{p}", "layernorm.{p}"),
            *block_rules(ours + "blocks", "encoder.layer", _PARTS),
            *(
                Rule(
                    f"{ours}blocks.{{i}}.{mine}.{part}_proj.{{p}}",
                    f"encoder.layer.{{i}}.{theirs}.attention.qkv.{{p}}",
                    Slice(index, 3),
                )
                for mine, theirs in (("attention", "attention"), ("time_attention", "temporal_attention"))
                for index, part in enumerate("qkv")
            ),
        ]
    )
    wraps = bool(model.heads) or any(name.startswith("timesformer.") for name in stored)
    rules = [Rule("heads.class.{p}", "classifier.{p}")]
    return (table.below("timesformer.") if wraps else table) + NameTable(rules)


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    encoder = _encoder(model)
    kinds = {ours: theirs for theirs, ours in _ATTENTIONS.items()}
    if encoder.attention not in kinds:
        raise ConfigError(f"timesformer: found attention: {encoder.attention}, expected one of {sorted(kinds)}")
    config: dict[str, Any] = {
        "model_type": "timesformer",
        "architectures": ["TimesformerModel"],
        "attention_type": kinds[encoder.attention],
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_frames": encoder.num_frames,
        **stack_config(encoder),
        "qkv_bias": True,
    }
    for head in model.heads.values():
        config |= {"architectures": [_CLASSIFIER], **label_config(head.classes)}
    processor = frame_processor(model.streams["video"].reader)
    return {"config.json": config, "preprocessor_config.json": processor}


def _encoder(model: ModelConfig) -> SpaceTimeConfig:
    encoder = model.streams["video"].encoder if list(model.streams) == ["video"] else None
    if not isinstance(encoder, SpaceTimeConfig) or {head.use for head in model.heads.values()} - {"class"}:
        raise ConfigError(
            "timesformer: found a model of other parts, expected one video stream with the encoder 'space_time'"
        )
    return encoder


_PREPROCESSOR = {"image_mean": [0.45] * 3, "image_std": [0.225] * 3}


def _size(parameters: int, side: int = 224, **config: Any) -> Size:
    config = {"model_type": "timesformer", "architectures": [_CLASSIFIER], "image_size": side, **config}
    preprocessor = {**_PREPROCESSOR, "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return Size(config, parameters, preprocessor)


TIMESFORMER = Architecture(
    "timesformer",
    ("timesformer",),
    "TimeSformer, arXiv 2102.05095, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # The paper states 121.4M for all three.
        "timesformer-base-k400": _size(121_566_352, num_labels=400),
        "timesformer-hr-k400": _size(122_024_080, 448, num_labels=400, num_frames=16),
        "timesformer-large-k400": _size(121_633_936, num_labels=400, num_frames=96),
    },
)
"""See the module."""
