"""BLIP checkpoints for retrieval: contrast and matching (``model_type: blip``, ``BlipForImageTextRetrieval``).

One text encoder serves both: alone it gives the text's vector, looking at the picture it says whether they match.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.heads.table import ProjectionConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.bert_blocks import POST_NORM_PARTS
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.clip import part_config, text_reader
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.rows import word_rows
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule, Slice

_TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
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
_KIND = "BlipForImageTextRetrieval"
_VISION_PARTS = {
    "attention_norm": "layer_norm1",
    "attention.out_proj": "self_attn.projection",
    "mlp_norm": "layer_norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream that the text's encoder looks at, both in one space, and the matching head."""
    text = {**_TEXT, **part_config(configs.config, "text", "blip")}
    vision = {**_VISION, **part_config(configs.config, "vision", "blip")}
    require(text, "blip", is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    require(vision, "blip", attention_dropout=0.0)
    image = {
        "use": "vit",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        **_stack(vision),
        "pool": "cls",
        "cls_feature": True,
    }
    words = {
        "use": "embedding",
        "width": text["hidden_size"],
        "vocab_size": text["vocab_size"],
        "max_tokens": text["max_position_embeddings"],
        "norm": True,
        "norm_eps": text["layer_norm_eps"],
    }
    reader = text_reader(configs, text["max_position_embeddings"])
    pixels = image_reader(configs.preprocessor, vision["image_size"], "BlipImageProcessor")
    space = {
        "use": "projection",
        "dim": configs.config.get("image_text_hidden_size", 256),
        "streams": ["image", "text"],
        "through": ["text"],
        "proj_bias": True,
        "temperature": None,
        "bias": None,
    }
    model = {
        "streams": {
            "image": {"modality": "image", "encoder": image, "reader": pixels, "enters": "cross_attention"},
            "text": {
                "modality": "text", "encoder": words, "reader": reader, "connector": "identity", "enters": "sequence",
            },
        },
        "backbone": {
            "use": "encoder",
            "cls": False,
            "token_types": False,
            "transformer": {**_stack(text), "pre_norm": False, "final_norm": False},
        },
        "heads": {"space": space, "match": {"use": "matching", "outputs": 2}},
    }  # fmt: skip
    return model if "tokenizer" in reader else {**model, "tokenizer": {"use": "bpe", "rows": text["vocab_size"]}}


def _stack(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "activation": activation(config["hidden_act"]),
        "norm_eps": config["layer_norm_eps"],
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``BlipForImageTextRetrieval``."""
    image, _ = _parts(model)
    trunk, words = "streams.image.encoder.trunk.", "streams.text.encoder."
    hub, width = "vision_model.", image.width
    blocks, layers = trunk + "transformer.blocks", hub + "encoder.layers"
    fused = [
        Rule(f"{blocks}.{{i}}.attention.{part}.{{p}}", f"{layers}.{{i}}.self_attn.qkv.{{p}}", Slice(place, 3))
        for place, part in enumerate(("q_proj", "k_proj", "v_proj"))
    ]
    return NameTable(
        [
            Rule(trunk + "patch_embed.{p}", hub + "embeddings.patch_embedding.{p}"),
            Rule(trunk + "cls_token", hub + "embeddings.class_embedding", Reshape((-1,), (1, 1, -1))),
            Rule(
                trunk + "learned_positions.weight",
                hub + "embeddings.position_embedding",
                Reshape((-1, width), (1, -1, width)),
            ),
            Rule(trunk + "transformer.final_norm.{p}", hub + "post_layernorm.{p}"),
            *fused,
            *block_rules(blocks, layers, _VISION_PARTS),
            Rule(words + "token_embed.{p}", "text_encoder.embeddings.word_embeddings.{p}"),
            Rule(words + "positions.weight", "text_encoder.embeddings.position_embeddings.weight"),
            Rule(words + "norm.{p}", "text_encoder.embeddings.LayerNorm.{p}"),
            *block_rules("backbone.transformer.blocks", "text_encoder.encoder.layer", POST_NORM_PARTS),
            Rule("heads.space.projs.image.{p}", "vision_proj.{p}"),
            Rule("heads.space.projs.text.{p}", "text_proj.{p}"),
            Rule("heads.match.proj.{p}", "itm_head.{p}"),
        ],
        ignored=("text_encoder.embeddings.position_ids",),
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    image, text = _parts(model)
    stack = model.backbone.transformer
    text_config = {
        "model_type": "blip_text_model",
        **_config(stack),
        "encoder_hidden_size": image.width,
        "vocab_size": word_rows(model, vocabulary),
        "max_position_embeddings": text.max_tokens,
        "is_decoder": True,
    }
    vision_config = {
        "model_type": "blip_vision_model",
        **_config(image),
        "image_size": image.image_size,
        "patch_size": image.patch_size,
    }
    space = next(head for head in model.heads.values() if isinstance(head, ProjectionConfig))
    config = {
        "model_type": "blip",
        "architectures": [_KIND],
        "text_config": text_config,
        "vision_config": vision_config,
        "image_text_hidden_size": space.dim,
    }
    processor = image_preprocessor(model.streams["image"].reader, "BlipImageProcessor")
    return {"config.json": config, "preprocessor_config.json": {**processor, "processor_class": "BlipProcessor"}}


def _config(stack: Any) -> dict[str, Any]:
    return {
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.mlp_dim or 4 * stack.width,
        "hidden_act": hub_activation(stack.activation),
        "layer_norm_eps": stack.norm_eps,
    }


def _parts(model: ModelConfig) -> tuple[VitConfig, EmbeddingConfig]:
    encoders = {name: stream.encoder for name, stream in model.streams.items()}
    image, text = encoders.get("image"), encoders.get("text")
    heads = sorted(head.use for head in model.heads.values())
    fits = isinstance(model.backbone, EncoderBackboneConfig) and len(encoders) == 2
    if not (
        fits
        and isinstance(image, VitConfig)
        and isinstance(text, EmbeddingConfig)
        and heads == ["matching", "projection"]
    ):
        raise ConfigError(
            "blip retrieval: found a model of other parts, expected an image stream with the encoder 'vit' that the "
            "backbone 'encoder' looks at, a text stream with 'embedding', and the heads 'projection' and 'matching'"
        )
    return image, text


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_BERT = {"num_attention_heads": 12}


def _size(parameters: int, vision: Mapping[str, Any]) -> Size:
    text = {**_BERT, "encoder_hidden_size": vision.get("hidden_size", 768)}
    config = {"model_type": "blip", "architectures": [_KIND], "text_config": text, "vision_config": dict(vision)}
    return Size(config, parameters)


BLIP_RETRIEVAL = Architecture(
    "blip-retrieval",
    ("blip",),
    "BLIP, arXiv 2201.12086, section 3.1",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={"blip-itm-base-coco": _size(223_744_258, {}), "blip-itm-large-coco": _size(446_128_642, _LARGE)},
    classes=(_KIND,),
)
"""See the module."""
