"""ViT checkpoints (``model_type: vit``) as an image stream, with a classifier where there is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.presets.activations import activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import VIT_PARTS, block_rules
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.presets.stacks import stack_config
from polymodal.models.presets.towers import grid_fields
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

_CLASSIFIER = "ViTForImageClassification"
_HAS_POOLER = "has_pooler"
"""A key of our own: the reference library takes this choice as an argument, and its configs do not hold it."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream without a backbone, and a ``class`` head where the checkpoint has one."""
    config = configs.config
    require(config, "vit", num_channels=3, qkv_bias=True, pooler_act="tanh")
    require(config, "vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    width = config.get("hidden_size", 768)
    require(config, "vit", pooler_output_size=(width, None))
    is_classifier = _CLASSIFIER in configs.classes
    encoder = {
        "use": "vit",
        **grid_fields(config.get("image_size", 224), config.get("patch_size", 16)),
        "width": width,
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "mlp_dim": config.get("intermediate_size", 3072),
        "activation": activation(config.get("hidden_act", "gelu")),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "pool": "cls",
        "pooler": not is_classifier and _has_pooler(configs),
    }
    reader = image_reader(configs.preprocessor, encoder["image_size"], "ViTImageProcessor")
    stream = {"modality": "image", "encoder": encoder, "reader": reader}
    heads = {"class": {"use": "class", "stream": "image", "classes": class_names(config)}} if is_classifier else {}
    return {"streams": {"image": stream}, "backbone": "none", "heads": heads}


def _has_pooler(configs: HubConfigs) -> bool:
    stored = configs.stored
    if stored:
        return any(name.endswith("pooler.dense.weight") for name in stored)
    return bool(configs.config.get(_HAS_POOLER, True))


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``ViTModel``, below ``vit.`` in the classes that wrap it."""
    trunk, width = "streams.image.encoder.trunk.", _encoder(model).width
    table = NameTable(
        [
            Rule(trunk + "patch_embed.{p}", "embeddings.patch_embeddings.projection.{p}"),
            Rule(trunk + "cls_token", "embeddings.cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(
                trunk + "learned_positions.weight",
                "embeddings.position_embeddings",
                Reshape((-1, width), (1, -1, width)),
            ),
            Rule(trunk + "transformer.final_norm.{p}", "layernorm.{p}"),
            Rule(trunk + "pooler.{p}", "pooler.dense.{p}"),
            *block_rules(trunk + "transformer.blocks", "encoder.layer", VIT_PARTS),
        ]
    )
    is_wrapped = bool(model.heads) or any(name.startswith("vit.") for name in stored)
    table = table.below("vit.") if is_wrapped else table
    return table + NameTable([Rule("heads.class.{p}", "classifier.{p}")])


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    encoder, heads = _encoder(model), list(model.heads.values())
    config = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        **stack_config(encoder),
        _HAS_POOLER: encoder.pooler,
    }
    if heads:
        config |= {"architectures": [_CLASSIFIER], **label_config(getattr(heads[0], "classes", ()))}
    processor = image_preprocessor(model.streams["image"].reader, "ViTImageProcessor")
    return {"config.json": config, "preprocessor_config.json": processor}


def _encoder(model: ModelConfig) -> VitConfig:
    encoder = model.streams["image"].encoder if list(model.streams) == ["image"] else None
    if not isinstance(encoder, VitConfig) or any(head.use != "class" for head in model.heads.values()):
        raise ConfigError(
            "vit: found a model of other parts, expected one image stream with the encoder 'vit', and no head "
            "but 'class'"
        )
    return encoder


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}


def _size(parameters: int, config: Mapping[str, Any], kind: str = _CLASSIFIER) -> Size:
    labels = {"num_labels": 1000} if kind == _CLASSIFIER else {}
    return Size({"model_type": "vit", "architectures": [kind], **labels, **config}, parameters)


VIT = Architecture(
    "vit",
    ("vit",),
    "ViT, arXiv 2010.11929, section 3.1",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "vit-base-patch16-224": _size(86_567_656, {}),
        "vit-base-patch16-224-in21k": _size(86_389_248, {}, "ViTModel"),
        "vit-base-patch32-384": _size(88_297_192, {"patch_size": 32, "image_size": 384}),
        "vit-large-patch16-224": _size(304_326_632, _LARGE),
        "vit-huge-patch14-224-in21k": _size(632_404_480, {**_HUGE, "patch_size": 14}, "ViTModel"),
    },
)
"""See the module."""
