"""BLIP checkpoints that write (``model_type: blip``): captions, and answers to questions about a picture.

Captioning is a decoder that looks at the picture. Answering is an encoder that reads the question looking at the
picture, and a decoder that looks at what it read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.image import ImageReaderConfig
from polymodal.modalities.text.files import read_backend
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.backbones.encoder_decoder import EncoderDecoderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.heads.next_token import NextTokenConfig
from polymodal.models.layers import TransformerConfig
from polymodal.models.presets.activations import activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.bert_blocks import POST_NORM_PARTS
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.clip import part_config
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.stacks import stack_config, stack_fields
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule, Slice

CAPTION, ANSWER = "BlipForConditionalGeneration", "BlipForQuestionAnswering"
START = "[DEC]"
_TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "bos_token_id": 30522,
}
_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
_VISION_PARTS = {
    "attention_norm": "layer_norm1",
    "attention.out_proj": "self_attn.projection",
    "mlp_norm": "layer_norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream that the text's stack looks at."""
    text, vision = text_config(configs), vision_config(configs)
    if ANSWER in configs.classes and text["hidden_size"] != vision["hidden_size"]:
        raise ConfigError(
            f"blip: found a text width of {text['hidden_size']} and an image width of {vision['hidden_size']}, "
            "expected equal ones: both look through layers of one size"
        )
    head = {
        "use": "next_token",
        "bias": True,
        "transform": True,
        "activation": activation(text["hidden_act"]),
        "norm_eps": text["layer_norm_eps"],
    }
    reader = image_reader(configs.preprocessor, vision["image_size"], "BlipImageProcessor")
    return {
        "streams": {
            "image": {
                "modality": "image",
                "encoder": vision_encoder(vision),
                "reader": reader,
                "enters": "cross_attention",
            }
        },
        "backbone": _backbone(text, answers=ANSWER in configs.classes),
        "heads": {"text": head},
        "tokenizer": _tokenizer(configs, text),
    }


def text_config(configs: HubConfigs) -> dict[str, Any]:
    """The text side's config, defaults filled in; what we do not build is refused."""
    text = {**_TEXT, **part_config(configs.config, "text", "blip")}
    require(text, "blip", is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return text


def vision_config(configs: HubConfigs) -> dict[str, Any]:
    """The image tower's config, defaults filled in."""
    return {**_VISION, **part_config(configs.config, "vision", "blip")}


def vision_encoder(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The image tower; its class token is a feature."""
    return {
        "use": "vit",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        **stack_fields(vision, "blip"),
        "pool": "cls",
        "cls_feature": True,
    }


def _backbone(text: Mapping[str, Any], *, answers: bool) -> dict[str, Any]:
    stack = {**stack_fields(text, "blip"), "pre_norm": False, "final_norm": False}
    shared = {
        "positions": "learned",
        "max_tokens": text["max_position_embeddings"],
        "embed_norm_eps": text["layer_norm_eps"],
    }
    if answers:
        stacks = {"encoder": stack, "decoder": stack, "shared": False}
        return {"use": "encoder_decoder", "chat": "blip-vqa", **shared, **stacks}
    return {"use": "decoder", "chat": "blip", **shared, "transformer": stack}


def _tokenizer(configs: HubConfigs, text: Mapping[str, Any]) -> dict[str, Any]:
    """BERT's tokenizer; the token that a decoder begins with stands behind its vocabulary and has no name there."""
    rows, start = text["vocab_size"], text["bos_token_id"]
    if configs.folder is None:
        return {"use": "bpe", "rows": rows}
    backend = read_backend(configs.folder)
    found = backend.token_to_id(START)
    found = backend.get_vocab_size(with_added_tokens=True) if found is None else found
    if found != start:
        raise ConfigError(
            f"{configs.folder}: the decoder begins with the id {start}, and the next free one of the tokenizer is "
            f"{found}; is it the tokenizer of this checkpoint?"
        )
    return {"use": "file", "path": str(configs.folder), "rows": rows, "add": (START,), "eos": "[SEP]"}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of the class that the model is."""
    width = model.streams["image"].encoder.width
    table = vision_names("streams.image.encoder.trunk.", "vision_model.", width)
    if isinstance(model.backbone, EncoderDecoderConfig):
        table += text_names("backbone.encoder.", "backbone.embed_source.", "text_encoder.")
        table += text_names("backbone.decoder.", "backbone.embed_tokens.", "text_decoder.bert.")
    else:
        table += text_names("backbone.", "backbone.embed_tokens.", "text_decoder.bert.")
    head, hub = "heads.text.", "text_decoder.cls.predictions."
    return table + NameTable(
        [
            Rule(head + "dense.{p}", hub + "transform.dense.{p}"),
            Rule(head + "norm.{p}", hub + "transform.LayerNorm.{p}"),
            Rule(head + "proj.bias", hub + "bias"),
        ],
        # The matrix is the embedding, and older files hold matrix and bias a second time.
        ignored=(hub + "decoder.weight", hub + "decoder.bias"),
    )


def vision_names(trunk: str, hub: str, width: int) -> NameTable:
    """Names of BLIP's image tower, whose projections are fused."""
    blocks, layers = trunk + "transformer.blocks", hub + "encoder.layers"
    fused = [
        Rule(f"{blocks}.{{i}}.attention.{part}.{{p}}", f"{layers}.{{i}}.self_attn.qkv.{{p}}", Slice(place, 3))
        for place, part in enumerate(("q_proj", "k_proj", "v_proj"))
    ]
    positions = Reshape((-1, width), (1, -1, width))
    return NameTable(
        [
            Rule(trunk + "patch_embed.{p}", hub + "embeddings.patch_embedding.{p}"),
            Rule(trunk + "cls_token", hub + "embeddings.class_embedding", Reshape((-1,), (1, 1, -1))),
            Rule(trunk + "learned_positions.weight", hub + "embeddings.position_embedding", positions),
            Rule(trunk + "transformer.final_norm.{p}", hub + "post_layernorm.{p}"),
            *fused,
            *block_rules(blocks, layers, _VISION_PARTS),
        ]
    )


def text_names(ours: str, embedding: str, hub: str) -> NameTable:
    """Names of one stack of BLIP's text side: embedding, positions, norm and blocks."""
    return NameTable(
        [
            Rule(embedding + "weight", hub + "embeddings.word_embeddings.weight"),
            Rule(ours + "embed_positions.weight", hub + "embeddings.position_embeddings.weight"),
            Rule(ours + "embed_norm.{p}", hub + "embeddings.LayerNorm.{p}"),
            *block_rules(ours + "transformer.blocks", hub + "encoder.layer", POST_NORM_PARTS),
        ],
        ignored=(hub + "embeddings.position_ids",),
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    image, stack, kind = _parts(model)
    controls = vocabulary.controls
    ids = {
        "bos_token_id": controls.get(START),
        "sep_token_id": controls.get("[SEP]"),
        "pad_token_id": vocabulary.pad_id,
    }
    text_part = {
        "model_type": "blip_text_model",
        **stack_config(stack),
        "encoder_hidden_size": image.width,
        "vocab_size": model.tokenizer.rows or vocabulary.size,
        "max_position_embeddings": model.backbone.max_tokens,
        "is_decoder": True,
        **{key: id for key, id in ids.items() if id is not None},
    }
    config = {
        "model_type": "blip",
        "architectures": [kind],
        "text_config": text_part,
        "vision_config": hub_vision_config(image),
    }
    reader = model.streams["image"].reader
    assert isinstance(reader, ImageReaderConfig)
    processor = image_preprocessor(reader, "BlipImageProcessor")
    return {"config.json": config, "preprocessor_config.json": {**processor, "processor_class": "BlipProcessor"}}


def hub_vision_config(encoder: VitConfig) -> dict[str, Any]:
    """The inverse of :func:`vision_encoder`."""
    return {
        "model_type": "blip_vision_model",
        **stack_config(encoder),
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
    }


def _parts(model: ModelConfig) -> tuple[VitConfig, TransformerConfig, str]:
    """Image tower, text stack and class of a model that BLIP can say."""
    backbone, heads = model.backbone, list(model.heads.values())
    image = model.streams["image"].encoder if list(model.streams) == ["image"] else None
    is_headed = list(model.heads) == ["text"] and isinstance(heads[0], NextTokenConfig)
    if isinstance(image, VitConfig) and is_headed and model.watched_streams == ["image"]:
        if isinstance(backbone, EncoderDecoderConfig):
            return image, backbone.decoder, ANSWER
        if isinstance(backbone, DecoderConfig):
            return image, backbone.transformer, CAPTION
    raise ConfigError(
        "blip: found a model of other parts, expected an image stream with the encoder 'vit' that a decoder or an "
        "encoder_decoder looks at, and a head 'text' for the next token"
    )


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def _size(kind: str, parameters: int, **vision: Any) -> Size:
    text = {"num_attention_heads": 12, "encoder_hidden_size": vision.get("hidden_size", 768)}
    return Size(
        {"model_type": "blip", "architectures": [kind], "text_config": text, "vision_config": vision}, parameters
    )


BLIP = Architecture(
    "blip",
    ("blip",),
    "BLIP, arXiv 2201.12086, section 3.1",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # As published, rounded: 224M, 446M, 361M, 361M.
        "blip-image-captioning-base": _size(CAPTION, 223_971_644),
        "blip-image-captioning-large": _size(CAPTION, 446_290_492, **_LARGE),
        "blip-vqa-base": _size(ANSWER, 361_230_140),
        "blip-vqa-capfilt-large": _size(ANSWER, 361_230_140),
    },
    classes=(CAPTION, ANSWER),
)
"""See the module."""
