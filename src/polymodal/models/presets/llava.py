"""LLaVA-1.5 checkpoints (``model_type: llava``): a vision tower, an MLP and a language model of any family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
from polymodal.models.presets.language import Language, chat_of, stop_ids, tokenizer_of
from polymodal.models.presets.language_table import LANGUAGES, find_language
from polymodal.models.presets.llama import LLAMA
from polymodal.models.presets.towers import vision_names
from polymodal.models.weights import HubConfigs, NameTable, Rule

_PROCESSORS = {"clip_vision_model": "CLIPImageProcessor", "siglip_vision_model": "SiglipImageProcessor"}
_IMAGE_TOKEN = "<image>"


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream among the text of a decoder."""
    return model_of(configs, lambda size_px, kind: {"reader": image_reader(configs.preprocessor, size_px, kind)})


def model_of(configs: HubConfigs, stream: Callable[[int, str], Mapping[str, Any]]) -> dict[str, Any]:
    """The model of a checkpoint in LLaVA's form.

    Args:
        configs: of the checkpoint.
        stream: side of the tower's image and the processor of its kind -> what its image stream has beside encoder,
            connector and entry: a reader, and how its tokens are arranged.
    """
    config = configs.config
    vision = dict(config.get("vision_config") or {})
    kind = vision.get("model_type", "clip_vision_model")
    encoder = vision_encoder(config, vision, kind)
    text = dict(config.get("text_config") or {})
    language = find_language(text.get("model_type", "llama"), f"{configs.model_type}: text_config")
    image_token = configs.processor.get("image_token") or configs.tokenizer.get("image_token") or _IMAGE_TOKEN
    chat = chat_of(configs)
    return {
        "streams": {
            "image": {
                "modality": "image",
                "encoder": encoder,
                **stream(encoder["image_size"], _PROCESSORS[kind]),
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


def language_of(backbone: Any) -> Language:
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
        found = DecoderConfig.parse({**again, "chat": "none"})
        if found.transformer.resolved() == backbone.transformer.resolved() and _around(found) == _around(backbone):
            return language
    raise ConfigError("found a decoder that no published family of language models describes")


def _around(backbone: DecoderConfig) -> tuple[Any, ...]:
    """What stands around the stack."""
    return backbone.positions, backbone.position_offset, backbone.embed_width


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, ``preprocessor_config.json``, ``processor_config.json`` and ``generation_config.json``."""
    if list(model.streams) != ["image"] or model.streams["image"].arrange is not None:
        raise ConfigError(
            f"llava: found the streams {sorted(model.streams)}, expected an image stream that arranges nothing"
        )
    kind = processor_kind(model)
    config, special, processor = hub_config(model, vocabulary, "llava")
    return {
        "config.json": config,
        "preprocessor_config.json": image_preprocessor(model.streams["image"].reader, kind),
        "processor_config.json": {"processor_class": "LlavaProcessor", **processor},
        "generation_config.json": special,
    }


def processor_kind(model: ModelConfig) -> str:
    """The image processor of the vision tower's kind."""
    is_clip = getattr(model.streams["image"].encoder, "embed_norm", False)
    return _PROCESSORS["clip_vision_model" if is_clip else "siglip_vision_model"]


def hub_config(
    model: ModelConfig, vocabulary: Vocabulary, kind: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """``config.json``, the special tokens, and the part of ``processor_config.json`` of a model in LLaVA's form.

    Args:
        model: with an image stream.
        vocabulary: of its tokenizer.
        kind: ``model_type``: llava, llava_next, llava_onevision.

    Raises:
        ConfigError: if the model has another form.
    """
    streams, heads = model.streams, list(model.heads.values())
    if [head.use for head in heads] != ["next_token"]:
        raise ConfigError(f"{kind}: found the heads {[head.use for head in heads]}, expected a next_token head")
    encoder, connector = streams["image"].encoder, streams["image"].connector
    if not isinstance(encoder, VitConfig) or not isinstance(connector, MLPConfig) or connector.depth != 2:
        raise ConfigError(
            f"{kind}: found the encoder {encoder.use!r} and the connector {getattr(connector, 'use', None)!r}, "
            "expected 'vit' and 'mlp' of depth 2"
        )
    is_clip = encoder.embed_norm
    tower = clip.tower_config("image", encoder) if is_clip else siglip.tower_config("image", encoder)
    language = language_of(model.backbone)
    rows = model.tokenizer.rows or vocabulary.size
    image_token = model.tokenizer.media or _IMAGE_TOKEN
    if image_token not in vocabulary.controls:
        raise ConfigError(
            f"{kind}: the tokenizer has no control token {image_token!r} to stand for a picture; name one of it that "
            "no text holds, model: {tokenizer: {media: <unk>}}"
        )
    strategy = "default" if is_clip else "full"
    special = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": list(model.backbone.stop_ids) or vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    config = {
        "model_type": kind,
        "architectures": [kind.title().replace("_", "") + "ForConditionalGeneration"],
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
        "image_token_index": vocabulary.controls[image_token],
    }
    processor: dict[str, Any] = {"image_token": image_token, "vision_feature_select_strategy": strategy}
    if kind != "llava_onevision":
        config["image_seq_length"] = encoder.num_features(1)
        processor |= {"patch_size": encoder.patch_size, "num_additional_image_tokens": int(is_clip)}
    return config, special, processor


VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LAST_BLOCK = 12_598_272
"""Parameters of the tower's last block and of the norm behind it, which features of layer -2 do not need."""


def _size(parameters: int, language: str) -> Size:
    text = {**LLAMA.sizes[language].config, "model_type": "llama", "vocab_size": 32064}
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": VISION,
        "text_config": text,
    }
    return Size(config, parameters, unused=LAST_BLOCK)


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
