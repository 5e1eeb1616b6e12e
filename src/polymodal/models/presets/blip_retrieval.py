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
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.bert_blocks import POST_NORM_PARTS
from polymodal.models.presets.blip import hub_vision_config, text_config, vision_config, vision_encoder, vision_names
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.clip import text_reader
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.rows import word_rows
from polymodal.models.presets.stacks import stack_config, stack_fields
from polymodal.models.weights import HubConfigs, NameTable, Rule

_KIND = "BlipForImageTextRetrieval"


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream that the text's encoder looks at, both in one space, and the matching head."""
    text, vision = text_config(configs), vision_config(configs)
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
            "image": {
                "modality": "image", "encoder": vision_encoder(vision), "reader": pixels, "enters": "cross_attention",
            },
            "text": {
                "modality": "text", "encoder": words, "reader": reader, "connector": "identity", "enters": "sequence",
            },
        },
        "backbone": {
            "use": "encoder",
            "cls": False,
            "token_types": False,
            "transformer": {**stack_fields(text, "blip"), "pre_norm": False, "final_norm": False},
        },
        "heads": {"space": space, "match": {"use": "matching", "outputs": 2}},
    }  # fmt: skip
    return model if "tokenizer" in reader else {**model, "tokenizer": {"use": "bpe", "rows": text["vocab_size"]}}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``BlipForImageTextRetrieval``."""
    image, _ = _parts(model)
    words = "streams.text.encoder."
    return vision_names("streams.image.encoder.trunk.", "vision_model.", image.width) + NameTable(
        [
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
    text_part = {
        "model_type": "blip_text_model",
        **stack_config(stack),
        "encoder_hidden_size": image.width,
        "vocab_size": word_rows(model, vocabulary),
        "max_position_embeddings": text.max_tokens,
        "is_decoder": True,
    }
    space = next(head for head in model.heads.values() if isinstance(head, ProjectionConfig))
    config = {
        "model_type": "blip",
        "architectures": [_KIND],
        "text_config": text_part,
        "vision_config": hub_vision_config(image),
        "image_text_hidden_size": space.dim,
    }
    processor = image_preprocessor(model.streams["image"].reader, "BlipImageProcessor")
    return {"config.json": config, "preprocessor_config.json": {**processor, "processor_class": "BlipProcessor"}}


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
