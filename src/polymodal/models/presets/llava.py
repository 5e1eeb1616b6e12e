"""LLaVA-1.5 checkpoints (``model_type: llava``): a vision tower, an MLP and a language model of any family."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.connectors.projections import MLPConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.presets import clip, siglip
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.language import chat_of, stop_ids, tokenizer_of
from polymodal.models.presets.language_table import LANGUAGES, find_language
from polymodal.models.presets.llama import LLAMA
from polymodal.models.presets.towers import vision_names
from polymodal.models.weights import HubConfigs, NameTable, Rule

_PROCESSORS = {"clip_vision_model": "CLIPImageProcessor", "siglip_vision_model": "SiglipImageProcessor"}
_IMAGE_TOKEN = "<image>"


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream among the text of a decoder."""
    config = configs.config
    vision = dict(config.get("vision_config") or {})
    kind = vision.get("model_type", "clip_vision_model")
    encoder = vision_encoder(config, vision, kind)
    text = dict(config.get("text_config") or {})
    language = find_language(text.get("model_type", "llama"), "llava: text_config")
    image_token = configs.processor.get("image_token") or configs.tokenizer.get("image_token") or _IMAGE_TOKEN
    chat = chat_of(configs)
    return {
        "streams": {
            "image": {
                "modality": "image",
                "encoder": encoder,
                "reader": image_reader(configs.preprocessor, encoder["image_size"], _PROCESSORS[kind]),
                "connector": {
                    "use": "mlp",
                    "depth": 2,
                    "activation": activation(config.get("projector_hidden_act", "gelu")),
                },
                "enters": "sequence",
            }
        },
        "backbone": {
            **language.backbone(text),
            "chat": chat if isinstance(chat, str) else {**chat, "start": True, "marks": {"image": image_token}},
            "stop_ids": stop_ids(configs) or stop_ids(HubConfigs(text)),
        },
        "heads": {"text": {"use": "next_token", "tied": language.is_tied({**text, **_tie(config)})}},
        "tokenizer": tokenizer_of(configs, int(text.get("vocab_size", language.rows)), image_token),
    }


def vision_encoder(config: Mapping[str, Any], vision: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The encoder of a vision tower, read at ``vision_feature_layer``.

    Args:
        config: of the whole model.
        vision: its ``vision_config``.
        kind: the tower's ``model_type``.

    Raises:
        ConfigError: for another tower, several layers, or features that hold the class token.
    """
    if kind not in _PROCESSORS:
        raise ConfigError(f"vision_config: found model_type {kind!r}, expected one of {list(_PROCESSORS)}")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or layer >= 0:
        raise ConfigError(f"vision_feature_layer: found {layer!r}, expected one layer counted from the end (-2)")
    is_clip = kind == "clip_vision_model"
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != ("default" if is_clip else "full"):
        raise ConfigError(
            f"vision_feature_select_strategy: found {strategy!r} with {kind}, expected patches alone: 'default' with "
            "CLIP, whose first feature is the class token, 'full' with SigLIP, which has none"
        )
    require(config, "llava", multimodal_projector_bias=True)
    encoder = clip.vision_encoder(vision) if is_clip else siglip.vision_encoder(vision)
    # The tower's last state is taken as it is, before the norm that follows it.
    unnormalised = {} if is_clip or layer != -1 else {"norm_features": False}
    return {**encoder, "layer": layer, **unnormalised}


def _tie(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"tie_word_embeddings": True} if config.get("tie_word_embeddings") else {}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``LlavaForConditionalGeneration``; older files have ``vision_tower.vision_model.``."""
    encoder, backbone = model.streams["image"].encoder, model.backbone
    older = "vision_tower.vision_model."
    tower = older if any(name.startswith(older) for name in stored) else "vision_tower."
    language = language_of(backbone)
    body = "language_model." + language.body
    head = next(iter(model.heads.values()))
    connector = NameTable(
        [
            Rule("streams.image.connector.stack.layers.0.{p}", "multi_modal_projector.linear_1.{p}"),
            Rule("streams.image.connector.stack.layers.1.{p}", "multi_modal_projector.linear_2.{p}"),
        ],
        unused=unused_of(encoder, tower),
    )
    return (
        vision_names("streams.image.encoder.", tower, encoder)
        + connector
        + language.names(backbone, body)
        + language.head_names(head.tied, "language_model.lm_head.weight")
    )


def unused_of(encoder: VitConfig, tower: str) -> tuple[str, ...]:
    """What the tower has beyond the layer whose features are read."""
    blocks = range(encoder.depth + 1 + encoder.layer, encoder.depth)
    return (
        *(f"{tower}encoder.layers.{block}.{{rest}}" for block in blocks),
        *([] if encoder.layer == -1 else [f"{tower}post_layernorm.{{p}}"]),
    )


def language_of(backbone: Any) -> Any:
    """The first family whose config says everything about a decoder.

    Raises:
        ConfigError: if there is none.
    """
    if not isinstance(backbone, DecoderConfig):
        raise ConfigError(f"found the backbone {backbone.use!r}, expected a decoder")
    for language in LANGUAGES.values():
        try:
            again = language.backbone(language.config(backbone, 1))
        except (ConfigError, KeyError, TypeError):
            continue
        stack = DecoderConfig.parse({**again, "chat": "none"}).transformer
        if stack.resolved() == backbone.transformer.resolved():
            return language
    raise ConfigError("found a decoder that no published family of language models describes")


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, ``preprocessor_config.json``, ``processor_config.json`` and ``generation_config.json``."""
    streams, heads = model.streams, list(model.heads.values())
    if list(streams) != ["image"] or [head.use for head in heads] != ["next_token"]:
        raise ConfigError(
            f"llava: found the streams {sorted(streams)} and the heads {[head.use for head in heads]}, expected an "
            "image stream and a next_token head"
        )
    encoder, connector, reader = streams["image"].encoder, streams["image"].connector, streams["image"].reader
    if not isinstance(encoder, VitConfig) or not isinstance(connector, MLPConfig) or connector.depth != 2:
        raise ConfigError(
            f"llava: found the encoder {encoder.use!r} and the connector {getattr(connector, 'use', None)!r}, expected "
            "'vit' and 'mlp' of depth 2"
        )
    is_clip = encoder.embed_norm
    tower = clip.tower_config("image", encoder) if is_clip else siglip.tower_config("image", encoder)
    language = language_of(model.backbone)
    rows = model.tokenizer.rows or vocabulary.size
    image_token = model.tokenizer.media or _IMAGE_TOKEN
    strategy = "default" if is_clip else "full"
    special = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": list(model.backbone.stop_ids) or vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": tower,
        "text_config": {
            "model_type": language.model_types[0],
            "tie_word_embeddings": heads[0].tied,
            **special,
            **language.config(model.backbone, rows),
        },
        "tie_word_embeddings": heads[0].tied,
        "vision_feature_layer": encoder.layer,
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": hub_activation(connector.activation),
        "image_seq_length": encoder.num_features(1),
        "image_token_index": vocabulary.controls.get(image_token, 0),
    }
    kind = _PROCESSORS["clip_vision_model" if is_clip else "siglip_vision_model"]
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": encoder.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(is_clip),
    }
    return {
        "config.json": config,
        "preprocessor_config.json": image_preprocessor(reader, kind),
        "processor_config.json": processor,
        "generation_config.json": special,
    }


_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_LAST_BLOCK = 12_598_272
"""Parameters of the tower's last block and of the norm behind it, which features of layer -2 do not need."""


def _size(parameters: int, language: str) -> Size:
    text = {**LLAMA.sizes[language].config, "model_type": "llama", "vocab_size": 32064}
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": _VISION,
        "text_config": text,
    }
    return Size(config, parameters, unused=_LAST_BLOCK)


LLAVA = Architecture(
    "llava",
    ("llava",),
    "LLaVA-1.5, arXiv 2310.03744, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "llava-1.5-7b": _size(7_063_427_072, "vicuna-7b-v1.5"),
        "llava-1.5-13b": _size(13_351_494_656, "vicuna-13b-v1.5"),
    },
)
"""See the module."""
