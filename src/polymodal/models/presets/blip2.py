"""BLIP-2 checkpoints (``model_type: blip-2``): an image tower, a Q-Former, and OPT, Llama or Flan-T5.

The Q-Former's queries, mapped to the language model's width, stand before the words: before the start token of a
decoder, in the encoder's sequence of an encoder-decoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.text.files import read_backend
from polymodal.models.backbones.encoder_decoder import EncoderDecoderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.connectors.qformer import QFormerConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blip import vision_names
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.language import stop_ids, tokenizer_of
from polymodal.models.presets.language_table import find_language
from polymodal.models.presets.llava import language_of
from polymodal.models.presets.opt import OPT
from polymodal.models.presets.stacks import stack_config
from polymodal.models.presets.t5 import T5, t5_backbone, t5_config, t5_head, t5_names
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

KIND, IMAGE = "Blip2ForConditionalGeneration", "<image>"
CHAT, T5_CHAT = "blip-2", "blip-2-t5"
_VISION: dict[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "qkv_bias": True,
}
QFORMER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "cross_attention_frequency": 2,
}
_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
QFORMER_PARTS = {
    **{f"attention.{ours}": f"attention.attention.{hub}" for ours, hub in _ATTENTION.items()},
    "attention.out_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    **{f"cross_attention.{ours}": f"crossattention.attention.{hub}" for ours, hub in _ATTENTION.items()},
    "cross_attention.out_proj": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
    "mlp.up_proj": "intermediate_query.dense",
    "mlp.down_proj": "output_query.dense",
    "mlp_norm": "output_query.LayerNorm",
}
"""Part of a block of ours -> stored part of a Q-Former's."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream whose queries stand before the words of a language model."""
    config = configs.config
    text = dict(config.get("text_config") or {"model_type": "opt"})
    qformer = {**QFORMER, **(config.get("qformer_config") or {})}
    require(qformer, "blip-2: qformer_config", use_qformer_text_input=False)
    encoder = vision_encoder(config, "blip-2")
    language = language_model(text, "blip-2: text_config")
    chat = T5_CHAT if language["backbone"]["use"] == "encoder_decoder" else CHAT
    ends = stop_ids(HubConfigs(text)) or stop_ids(configs)
    return {
        "streams": {
            "image": {
                "modality": "image",
                "encoder": encoder,
                "reader": image_reader(configs.preprocessor, encoder["image_size"], "BlipImageProcessor"),
                "connector": qformer_connector(config, qformer),
                "enters": "sequence",
            }
        },
        "backbone": {**language["backbone"], "chat": chat, "stop_ids": ends},
        "heads": {"text": language["head"]},
        "tokenizer": tokenizer_of(configs, language["rows"], placeholder(configs)),
    }


def vision_encoder(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The encoder of ``vision_config``: EVA's giant in BLIP's layout, the class token a feature."""
    vision = {**_VISION, **(config.get("vision_config") or {})}
    require(vision, f"{where}: vision_config", attention_dropout=0.0, qkv_bias=True)
    return {
        "use": "vit",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "mlp_dim": vision["intermediate_size"],
        "activation": activation(vision["hidden_act"]),
        "norm_eps": vision["layer_norm_eps"],
        "pool": "cls",
        "cls_feature": True,
    }


def qformer_connector(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The connector of ``qformer_config``, its defaults filled in."""
    require(given, "qformer_config", attention_probs_dropout_prob=given["hidden_dropout_prob"])
    return {
        "use": "qformer",
        "queries": config.get("num_query_tokens", 32),
        "width": given["hidden_size"],
        "depth": given["num_hidden_layers"],
        "heads": given["num_attention_heads"],
        "mlp_dim": given["intermediate_size"],
        "activation": activation(given["hidden_act"]),
        "cross_every": given["cross_attention_frequency"],
        "norm_eps": given["layer_norm_eps"],
        "dropout": given["hidden_dropout_prob"],
    }


def language_model(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``backbone``, ``head`` and ``rows`` of a ``text_config``: T5, or any family of decoders."""
    kind = text.get("model_type", "opt")
    if kind == "t5":
        return {"backbone": t5_backbone(text), "head": t5_head(text), "rows": int(text.get("vocab_size", 32_128))}
    language = find_language(kind, where)
    return {
        "backbone": language.backbone(text),
        "head": {"use": "next_token", "tied": language.is_tied(text)},
        "rows": int(text.get("vocab_size", language.rows)),
    }


def placeholder(configs: HubConfigs) -> str | None:
    """The image token, where the tokenizer holds one; the first files do without."""
    if configs.folder is None or read_backend(configs.folder).token_to_id(IMAGE) is None:
        return None
    return IMAGE


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``Blip2ForConditionalGeneration``."""
    image, connector = image_parts(model, "blip-2")
    ours = "streams.image.connector."
    return (
        vision_names("streams.image.encoder.trunk.", "vision_model.", image.width)
        + NameTable([Rule(ours + "query_norm.{p}", "qformer.layernorm.{p}")])
        + qformer_names(ours, connector)
        + language_names(model, stored)
    )


def qformer_names(ours: str, connector: QFormerConfig) -> NameTable:
    """Names of queries, blocks and the map to the language model's width."""
    queries = Reshape((connector.queries, connector.width), (1, connector.queries, connector.width))
    return NameTable(
        [
            Rule(ours + "queries", "query_tokens", queries),
            Rule(ours + "out.layers.0.{p}", "language_projection.{p}"),
            *block_rules(ours + "transformer.blocks", "qformer.encoder.layer", QFORMER_PARTS),
        ]
    )


def language_names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of the language model below ``language_model.``."""
    head = next(iter(model.heads.values()))
    if isinstance(model.backbone, EncoderDecoderConfig):
        return t5_names(model.backbone, stored, head.tied, "heads.text").below("language_model.")
    language = language_of(model.backbone)
    return language.names(model.backbone, "language_model." + language.body) + language.head_names(
        head.tied, "language_model.lm_head.weight"
    )


def image_parts(model: ModelConfig, where: str) -> tuple[VitConfig, QFormerConfig]:
    """Image tower and Q-Former.

    Raises:
        ConfigError: if the model has other parts.
    """
    image = model.streams.get("image")
    encoder, connector = (None, None) if image is None else (image.encoder, image.connector)
    heads = {name: head.use for name, head in model.heads.items()}
    fits = isinstance(encoder, VitConfig) and encoder.cls_feature and heads == {"text": "next_token"}
    if not fits or not isinstance(encoder, VitConfig) or not isinstance(connector, QFormerConfig):
        raise ConfigError(
            f"{where}: found the streams {sorted(model.streams)} and the heads {heads}, expected an image stream with "
            "the encoder 'vit', its class token a feature, and the connector 'qformer', and a next_token head 'text'"
        )
    return encoder, connector


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, ``preprocessor_config.json``, ``processor_config.json`` and ``generation_config.json``."""
    encoder, connector = image_parts(model, "blip-2")
    if list(model.streams) != ["image"] or connector.words:
        raise ConfigError(f"blip-2: found the streams {sorted(model.streams)}, expected 'image' alone")
    return hub_files(model, vocabulary, encoder, connector)


def hub_files(
    model: ModelConfig, vocabulary: Vocabulary, encoder: VitConfig, connector: QFormerConfig
) -> dict[str, dict[str, Any]]:
    """The files of a model with these parts."""
    text = text_config(model, vocabulary)
    config = {
        "model_type": "blip-2",
        "architectures": [KIND],
        "vision_config": {"model_type": "blip_2_vision_model", **vision_config(encoder)},
        "qformer_config": {"model_type": "blip_2_qformer", **qformer_config(encoder, connector)},
        "text_config": text,
        "num_query_tokens": connector.queries,
        "image_token_index": vocabulary.controls.get(IMAGE),
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    special = {key: text.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")}
    return {
        "config.json": config,
        "preprocessor_config.json": image_preprocessor(model.streams["image"].reader, "BlipImageProcessor"),
        "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": connector.queries},
        "generation_config.json": {key: value for key, value in special.items() if value is not None},
    }


def vision_config(encoder: VitConfig) -> dict[str, Any]:
    """The inverse of :func:`vision_encoder`."""
    return {
        **stack_config(encoder),
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "qkv_bias": True,
    }


def qformer_config(encoder: VitConfig, connector: QFormerConfig) -> dict[str, Any]:
    """The inverse of :func:`qformer_connector`."""
    return {
        "hidden_size": connector.width,
        "intermediate_size": connector.mlp_dim or 4 * connector.width,
        "num_hidden_layers": connector.depth,
        "num_attention_heads": connector.heads,
        "hidden_act": hub_activation(connector.activation),
        "layer_norm_eps": connector.norm_eps,
        "hidden_dropout_prob": connector.dropout,
        "attention_probs_dropout_prob": connector.dropout,
        "cross_attention_frequency": connector.cross_every,
        "encoder_hidden_size": encoder.width,
    }


def text_config(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """``text_config`` of the language model."""
    backbone, head = model.backbone, next(iter(model.heads.values()))
    rows = model.tokenizer.rows or vocabulary.size
    ends = list(backbone.stop_ids)
    special = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    if isinstance(backbone, EncoderDecoderConfig):
        start = {"decoder_start_token_id": vocabulary.controls.get("<pad>", vocabulary.pad_id)}
        return {"model_type": "t5", **special, **start, **t5_config(backbone, head, rows)}
    language = language_of(backbone)
    return {
        "model_type": language.model_types[0],
        "architectures": [language.kind],
        "tie_word_embeddings": head.tied,
        **special,
        **language.config(backbone, rows),
    }


def size(text: Mapping[str, Any], parameters: int, **rows: int) -> Size:
    """A published size with the usual image tower and Q-Former."""
    config = {
        "model_type": "blip-2",
        "architectures": [KIND],
        "vision_config": dict(_VISION),
        "qformer_config": {**QFORMER, "encoder_hidden_size": _VISION["hidden_size"]},
        "text_config": {**text, **rows},
        "num_query_tokens": 32,
    }
    return Size(config, parameters)


BLIP2 = Architecture(
    "blip-2",
    ("blip-2",),
    "BLIP-2, arXiv 2301.12597, sections 3.1 and 3.3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # As published, rounded: 3.7B, 7.8B, 3.9B, 12.2B.
        "blip2-opt-2.7b": size(OPT.sizes["opt-2.7b"].config, 3_744_761_856, vocab_size=50304),
        "blip2-opt-6.7b": size(OPT.sizes["opt-6.7b"].config, 7_752_869_376, vocab_size=50304),
        "blip2-flan-t5-xl": size(T5.sizes["flan-t5-xl"].config, 3_942_446_592),
        "blip2-flan-t5-xxl": size(T5.sizes["flan-t5-xxl"].config, 12_229_596_672),
    },
    classes=(KIND,),
    float32=("query_tokens", "qformer", "wo"),
)
"""See the module."""
