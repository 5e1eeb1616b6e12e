"""CLIP checkpoints: two towers in one space (``model_type: clip``), or one of them."""

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
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.presets.stacks import stack_config, stack_fields
from polymodal.models.presets.towers import grid_fields, text_names, vision_names
from polymodal.models.weights import HubConfigs, NameTable, Rule

_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_LEGACY_EOS = 2
"""Configs written before the end token's id was right; pooling then takes the highest id, which is the end token's."""
_CLASSIFIER = "CLIPForImageClassification"


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Image and text stream and the shared space; a single tower; or an image tower with a classifier."""
    config, kind = configs.config, configs.model_type
    streams: dict[str, Any] = {}
    if kind != "clip_text_model":
        vision = vision_encoder(part_config(config, "vision", kind))
        reader = image_reader(configs.preprocessor, vision["image_size"], "CLIPImageProcessor")
        streams["image"] = {"modality": "image", "encoder": vision, "reader": reader}
    if kind != "clip_vision_model" and _CLASSIFIER not in configs.classes:
        text = text_encoder(part_config(config, "text", kind))
        reader = text_reader(configs, text["max_tokens"])
        streams["text"] = {"modality": "text", "encoder": text, "reader": reader}
    heads: dict[str, Any] = {}
    if _CLASSIFIER in configs.classes:
        heads["class"] = {"use": "class", "stream": "image", "take": "mean", "classes": class_names(config)}
    elif kind == "clip":
        init = config.get("logit_scale_init_value", 2.6592)
        heads["projection"] = {**_projection(config), "temperature": from_log_scale(init)}
    elif any(name.endswith("WithProjection") for name in configs.classes):
        heads["projection"] = {**_projection(config), "temperature": None}
    return {"streams": streams, "backbone": "none", "heads": heads, **own_rows(streams)}


def _projection(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use": "projection", "dim": config.get("projection_dim", 512), "bias": None}


def part_config(config: Mapping[str, Any], part: str, kind: str) -> Mapping[str, Any]:
    """The config of a tower: all of it for a single one, else ``text_config`` with what ``text_config_dict`` adds."""
    if kind.endswith(f"{part}_model"):
        return config
    return {**(config.get(f"{part}_config") or {}), **(config.get(f"{part}_config_dict") or {})}


def vision_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """An image tower's encoder from its ``vision_config``; features are not normalised, the pooled vector is."""
    require(config, "clip", num_channels=3)
    given = {**_VISION, **config}
    return {
        "use": "vit",
        **grid_fields(given["image_size"], given["patch_size"]),
        **stack_fields(given, "clip"),
        "pool": "cls",
        "embed_norm": True,
        "patch_bias": False,
        "norm_features": False,
    }


def text_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A text tower's encoder from its ``text_config``."""
    given = {**_TEXT, **config}
    is_legacy = given["eos_token_id"] == _LEGACY_EOS
    return {
        "use": "text_transformer",
        "vocab_size": given["vocab_size"],
        "max_tokens": given["max_position_embeddings"],
        **stack_fields(given, "clip"),
        "causal": True,
        "pool": "highest" if is_legacy else "eos",
        "eos_id": None if is_legacy else given["eos_token_id"],
    }


def text_reader(configs: HubConfigs, max_tokens: int) -> dict[str, Any]:
    """Texts between the tokenizer's own start and end token; the checkpoint's tokenizer, where there is a folder."""
    reader: dict[str, Any] = {"use": "text", "max_tokens": max_tokens, "add_special": True}
    return reader if configs.folder is None else {**reader, "tokenizer": str(configs.folder)}


def own_rows(streams: Mapping[str, Any]) -> dict[str, Any]:
    """For a text tower without tokenizer files (a published size): the model's tokenizer, and the tower's rows."""
    text = streams.get("text")
    if text is None or "tokenizer" in text["reader"]:
        return {}
    return {"tokenizer": {"use": "bpe", "rows": text["encoder"]["vocab_size"]}}


def from_log_scale(log_scale: float) -> float:
    """The temperature of a logarithmic scale, to twelve digits, so that it survives the way there and back."""
    return float(f"{math.exp(-log_scale):.12g}")


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``CLIPModel`` and of the classes of a single tower, which some files store without its prefix."""
    table = NameTable([])
    for name, stream in model.streams.items():
        tower = "vision_model." if name == "image" else "text_model."
        is_bare = bool(stored) and not any(key.startswith(tower) for key in stored)
        hub, ours = "" if is_bare else tower, f"streams.{name}.encoder."
        table += vision_names(ours, hub, stream.encoder) if name == "image" else text_names(ours, hub)
    return table + NameTable(
        [
            Rule("heads.projection.projs.image.{p}", "visual_projection.{p}"),
            Rule("heads.projection.projs.text.{p}", "text_projection.{p}"),
            Rule("heads.projection.log_scale", "logit_scale"),
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
            **_space(heads["projection"], "CLIPModel"),
            "model_type": "clip",
            "vision_config": towers["image"],
            "text_config": towers["text"],
        }
    elif set(towers) == {"image"} and set(heads) == {"class"}:
        config = {"model_type": "clip", "architectures": [_CLASSIFIER], "vision_config": towers["image"]}
        config |= label_config(_classes(heads["class"]))
    elif len(towers) == 1 and set(heads) <= {"projection"}:
        kind = "CLIPVisionModel" if "image" in towers else "CLIPTextModel"
        config = {**next(iter(towers.values())), "architectures": [kind]}
        config |= _space(heads["projection"], kind + "WithProjection") if heads else {}
    else:
        raise ConfigError(
            f"clip: found the streams {sorted(towers)} and the heads {sorted(heads)}, expected image and text with a "
            "projection head, or one of them"
        )
    files = {"config.json": config}
    if "image" in model.streams:
        files["preprocessor_config.json"] = image_preprocessor(model.streams["image"].reader, "CLIPImageProcessor")
    return files


def tower_config(name: str, encoder: Any) -> dict[str, Any]:
    """``vision_config`` or ``text_config`` of an encoder.

    Raises:
        ConfigError: if it is no tower of CLIP's.
    """
    if name == "image" and isinstance(encoder, VitConfig):
        own = {"image_size": encoder.image_size, "patch_size": encoder.patch_size}
        return {"model_type": "clip_vision_model", **stack_config(encoder), **own}
    if name == "text" and isinstance(encoder, TextTransformerConfig):
        own = {"vocab_size": encoder.vocab_size, "max_position_embeddings": encoder.max_tokens}
        eos_id = _LEGACY_EOS if encoder.pool == "highest" else encoder.eos_id
        return {"model_type": "clip_text_model", **stack_config(encoder), **own, "eos_token_id": eos_id}
    raise ConfigError(
        f"clip: found the stream {name!r} with the encoder {encoder.use!r}, expected image with 'vit' and text with "
        "'text_transformer'"
    )


def _space(head: Any, kind: str) -> dict[str, Any]:
    assert isinstance(head, ProjectionConfig)
    scale = {} if head.temperature is None else {"logit_scale_init_value": -math.log(head.temperature)}
    return {"architectures": [kind], "projection_dim": head.dim, **scale}


def _classes(head: Any) -> tuple[str, ...]:
    assert isinstance(head, ClassConfig)
    return head.classes


_L14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_L14_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": _LEGACY_EOS}


def _size(parameters: int, vision: Mapping[str, Any], text: Mapping[str, Any], dim: int) -> Size:
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": dim,
        "vision_config": dict(vision),
        "text_config": dict(text),
    }
    return Size(config, parameters)


_B_TEXT = {"eos_token_id": _LEGACY_EOS}
CLIP = Architecture(
    "clip",
    ("clip", "clip_vision_model", "clip_text_model"),
    "CLIP, arXiv 2103.00020, sections 2.3 and 2.4",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "clip-vit-base-patch32": _size(151_277_313, {}, _B_TEXT, 512),
        "clip-vit-base-patch16": _size(149_620_737, {"patch_size": 16}, _B_TEXT, 512),
        "clip-vit-large-patch14": _size(427_616_513, _L14, _L14_TEXT, 768),
        "clip-vit-large-patch14-336": _size(427_944_193, {**_L14, "image_size": 336}, _L14_TEXT, 768),
    },
)
"""See the module."""
