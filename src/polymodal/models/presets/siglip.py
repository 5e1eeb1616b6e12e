"""SigLIP checkpoints, and those of SigLIP 2 with a fixed resolution, which share the class (``model_type: siglip``)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.text_transformer import TextTransformerConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.heads.table import ClassConfig, ProjectionConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.clip import from_log_scale, own_rows, part_config, text_reader
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.presets.stacks import stack_config, stack_fields
from polymodal.models.presets.towers import grid_fields, text_names, vision_names
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

_STACK: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_CLASSIFIER = "SiglipForImageClassification"
_SCALE, _BIAS = "logit_scale_init_value", "logit_bias_init_value"
"""Keys of our own: where temperature and bias began; the reference library's configs do not hold them."""
_START = {_SCALE: math.log(10.0), _BIAS: -10.0}
"""What they begin with (arXiv 2303.15343, section 3.2)."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Image and text stream and the shared space; a single tower; or an image tower with a classifier."""
    config, kind = configs.config, configs.model_type
    streams: dict[str, Any] = {}
    if kind != "siglip_text_model":
        vision = vision_encoder(part_config(config, "vision", kind))
        reader = image_reader(configs.preprocessor, vision["image_size"], "SiglipImageProcessor")
        streams["image"] = {"modality": "image", "encoder": vision, "reader": reader}
    if kind != "siglip_vision_model" and _CLASSIFIER not in configs.classes:
        require(configs.tokenizer, "siglip tokenizer", padding_side="right")
        text = text_encoder(part_config(config, "text", kind))
        reader = {**text_reader(configs, text["max_tokens"]), "fill": True}
        streams["text"] = {"modality": "text", "encoder": text, "reader": reader}
    heads: dict[str, Any] = {}
    if _CLASSIFIER in configs.classes:
        heads["class"] = {"use": "class", "stream": "image", "take": "mean", "classes": class_names(config)}
    elif kind == "siglip":
        heads["projection"] = {
            "use": "projection",
            "dim": streams["image"]["encoder"]["width"],
            "identity": ("image", "text"),
            "temperature": from_log_scale(config.get(_SCALE, _START[_SCALE])),
            "max_scale": None,
            "bias": config.get(_BIAS, _START[_BIAS]),
        }
    return {"streams": streams, "backbone": "none", "heads": heads, **own_rows(streams)}


def vision_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """An image tower's encoder from its ``vision_config``; without its head the pooled vector is the mean."""
    require(config, "siglip", num_channels=3)
    return {
        "use": "vit",
        **grid_fields(config.get("image_size", 224), config.get("patch_size", 16)),
        **stack_fields({**_STACK, **config}, "siglip"),
        "pool": "attention" if config.get("vision_use_head", True) else "mean",
    }


def text_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A text tower's encoder from its ``text_config``; it sees texts filled up, and its last token is what counts."""
    fields = stack_fields({**_STACK, **config}, "siglip")
    return {
        "use": "text_transformer",
        "vocab_size": config.get("vocab_size", 32000),
        "max_tokens": config.get("max_position_embeddings", 64),
        **fields,
        "pool": "last",
        "pooled_proj": config.get("projection_size") or fields["width"],
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``SiglipModel`` and of the classes of a single tower, which some files store without its prefix."""
    table = NameTable([])
    for name, stream in model.streams.items():
        tower = "vision_model." if name == "image" else "text_model."
        is_bare = bool(stored) and not any(key.startswith(tower) for key in stored)
        hub, ours = "" if is_bare else tower, f"streams.{name}.encoder."
        table += vision_names(ours, hub, stream.encoder) if name == "image" else text_names(ours, hub)
    return table + NameTable(
        [
            Rule("heads.projection.log_scale", "logit_scale", Reshape((), (1,))),
            Rule("heads.projection.bias", "logit_bias", Reshape((), (1,))),
            Rule("heads.class.{p}", "classifier.{p}"),
        ]
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` of the class that holds these towers and heads, and ``preprocessor_config.json``."""
    heads = {head.use: head for head in model.heads.values()}
    towers = {name: tower_config(name, stream.encoder) for name, stream in model.streams.items()}
    if "text" in towers and getattr(model.streams["text"].reader, "tokenizer", None) is None:
        towers["text"]["vocab_size"] = vocabulary.size
    if set(towers) == {"image", "text"} and set(heads) == {"projection"}:
        config = {
            "model_type": "siglip",
            "architectures": ["SiglipModel"],
            "vision_config": towers["image"],
            "text_config": towers["text"],
            **_start(heads["projection"]),
        }
    elif set(towers) == {"image"} and set(heads) == {"class"}:
        config = {"model_type": "siglip", "architectures": [_CLASSIFIER], "vision_config": towers["image"]}
        config |= label_config(_classes(heads["class"]))
    elif len(towers) == 1 and not heads:
        kind = "SiglipVisionModel" if "image" in towers else "SiglipTextModel"
        config = {**next(iter(towers.values())), "architectures": [kind]}
    else:
        raise ConfigError(
            f"siglip: found the streams {sorted(towers)} and the heads {sorted(heads)}, expected image and text with a "
            "projection head, or one of them"
        )
    files = {"config.json": config}
    if "image" in model.streams:
        files["preprocessor_config.json"] = image_preprocessor(model.streams["image"].reader, "SiglipImageProcessor")
    return files


def tower_config(name: str, encoder: Any) -> dict[str, Any]:
    """``vision_config`` or ``text_config`` of an encoder.

    Raises:
        ConfigError: if it is no tower of SigLIP's.
    """
    if name == "image" and isinstance(encoder, VitConfig):
        own = {"image_size": encoder.image_size, "patch_size": encoder.patch_size}
        head = {"vision_use_head": encoder.pool == "attention"}
        return {"model_type": "siglip_vision_model", **stack_config(encoder), **own, **head}
    if name == "text" and isinstance(encoder, TextTransformerConfig):
        own = {"vocab_size": encoder.vocab_size, "max_position_embeddings": encoder.max_tokens}
        size = {"projection_size": encoder.pooled_width}
        return {"model_type": "siglip_text_model", **stack_config(encoder), **own, **size}
    raise ConfigError(
        f"siglip: found the stream {name!r} with the encoder {encoder.use!r}, expected image with 'vit' and text with "
        "'text_transformer'"
    )


def _start(head: Any) -> dict[str, Any]:
    assert isinstance(head, ProjectionConfig)
    if head.temperature is None or head.bias is None:
        raise ConfigError("siglip: found a projection head without temperature or bias, expected both")
    return {_SCALE: -math.log(head.temperature), _BIAS: head.bias}


def _classes(head: Any) -> tuple[str, ...]:
    assert isinstance(head, ClassConfig)
    return head.classes


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_GIANT = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 16}


def _size(parameters: int, vision: Mapping[str, Any], text: Mapping[str, Any], **more: Any) -> Size:
    config = {"model_type": "siglip", "architectures": ["SiglipModel"]}
    return Size({**config, "vision_config": {**vision, **more}, "text_config": dict(text)}, parameters)


_V2 = {"vocab_size": 256_000}
SIGLIP = Architecture(
    "siglip",
    ("siglip", "siglip_vision_model", "siglip_text_model"),
    "SigLIP, arXiv 2303.15343, section 3.2; SigLIP 2, arXiv 2502.14786, section 2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "siglip-base-patch16-224": _size(203_155_970, {}, {}),
        "siglip-base-patch16-384": _size(203_447_810, {}, {}, image_size=384),
        "siglip-large-patch16-256": _size(652_150_786, _LARGE, _LARGE, image_size=256),
        "siglip-so400m-patch14-384": _size(877_960_498, _SO400M, _SO400M, image_size=384, patch_size=14),
        "siglip2-base-patch16-224": _size(375_187_970, {}, _V2),
        "siglip2-large-patch16-256": _size(881_526_786, _LARGE, {**_LARGE, **_V2}, image_size=256),
        "siglip2-so400m-patch14-384": _size(1_136_008_498, _SO400M, {**_SO400M, **_V2}, image_size=384, patch_size=14),
        "siglip2-giant-opt-patch16-256": _size(
            1_871_393_906, _GIANT, {**_SO400M, **_V2, "projection_size": 1536}, image_size=256
        ),
    },
)
"""See the module."""
