"""BLIP-2 checkpoints of the first stage (``Blip2ForImageTextRetrieval``): contrast and matching.

An image tower and a Q-Former that reads texts beside its queries: apart for contrast, together for matching.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.table import NoBackboneConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.connectors.qformer import QFormerConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.heads.table import ProjectionConfig
from polymodal.models.presets import blip2
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blip import vision_names
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.clip import text_reader
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.instructblip import WORD_PARTS
from polymodal.models.presets.rows import word_rows
from polymodal.models.weights import HubConfigs, NameTable, Rule

KIND = "Blip2ForImageTextRetrieval"
_TEXT = {"vocab_size": 30522, "max_position_embeddings": 512}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream whose Q-Former reads the text stream, one space, and the matching head."""
    config = configs.config
    qformer = {**blip2.QFORMER, **_TEXT, **(config.get("qformer_config") or {})}
    require({"use_qformer_text_input": False, **qformer}, "blip-2 retrieval", use_qformer_text_input=True)
    encoder = blip2.vision_encoder(config, "blip-2 retrieval")
    most = qformer["max_position_embeddings"]
    words = {
        "use": "embedding",
        "width": qformer["hidden_size"],
        "vocab_size": qformer["vocab_size"],
        "max_tokens": most,
    }
    reader = text_reader(configs, most)
    space = {
        "use": "projection",
        "dim": config.get("image_text_hidden_size", 256),
        "streams": ["image", "text"],
        "through": ["image", "text"],
        "proj_bias": True,
        "temperature": None,
        "bias": None,
    }
    model = {
        "streams": {
            "image": {
                "modality": "image",
                "encoder": encoder,
                "reader": image_reader(configs.preprocessor, encoder["image_size"], "BlipImageProcessor"),
                "connector": {**blip2.qformer_connector(config, qformer), "words": True},
            },
            "text": {"modality": "text", "encoder": words, "reader": reader, "enters": "beside_queries"},
        },
        "backbone": "none",
        "heads": {"space": space, "match": {"use": "matching", "at": "queries", "outputs": 2}},
    }
    return model if "tokenizer" in reader else {**model, "tokenizer": {"use": "bpe", "rows": qformer["vocab_size"]}}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``Blip2ForImageTextRetrieval``."""
    image, connector, _ = _parts(model)
    ours, words = "streams.image.connector.", "streams.text.encoder."
    own = NameTable(
        [
            Rule(ours + "query_norm.{p}", "qformer.layernorm.{p}"),
            Rule(words + "token_embed.weight", "embeddings.word_embeddings.weight"),
            Rule(words + "positions.weight", "embeddings.position_embeddings.weight"),
            *block_rules(ours + "word_paths", "qformer.encoder.layer", WORD_PARTS),
            Rule("heads.space.projs.image.{p}", "vision_projection.{p}"),
            Rule("heads.space.projs.text.{p}", "text_projection.{p}"),
            Rule("heads.match.proj.{p}", "itm_head.{p}"),
        ],
        ignored=("embeddings.position_ids",),
    )
    return (
        vision_names("streams.image.encoder.trunk.", "vision_model.", image.width)
        + own
        + blip2.qformer_names(ours, connector)
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, ``preprocessor_config.json`` and ``processor_config.json``."""
    image, connector, words = _parts(model)
    read = {"vocab_size": word_rows(model, vocabulary), "max_position_embeddings": words.max_tokens}
    space = next(head for head in model.heads.values() if isinstance(head, ProjectionConfig))
    qformer = {**blip2.qformer_config(image, connector), **read, "use_qformer_text_input": True}
    config = {
        "model_type": "blip-2",
        "architectures": [KIND],
        "vision_config": {"model_type": "blip_2_vision_model", **blip2.vision_config(image)},
        "qformer_config": {"model_type": "blip_2_qformer", **qformer},
        "num_query_tokens": connector.queries,
        "image_text_hidden_size": space.dim,
        "image_token_index": vocabulary.controls.get(blip2.IMAGE),
    }
    return {
        "config.json": config,
        "preprocessor_config.json": image_preprocessor(model.streams["image"].reader, "BlipImageProcessor"),
        "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": connector.queries},
    }


def _parts(model: ModelConfig) -> tuple[VitConfig, QFormerConfig, EmbeddingConfig]:
    """Image tower, Q-Former and embedding of the words.

    Raises:
        ConfigError: if the model has other parts.
    """
    image, text = model.streams.get("image"), model.streams.get("text")
    heads = sorted((head.use, getattr(head, "at", "queries")) for head in model.heads.values())
    if image is not None and text is not None and len(model.streams) == 2:
        encoder, connector, words = image.encoder, image.connector, text.encoder
        fits = isinstance(model.backbone, NoBackboneConfig) and isinstance(encoder, VitConfig) and encoder.cls_feature
        fits = fits and heads == [("matching", "queries"), ("projection", "queries")]
        if fits and isinstance(connector, QFormerConfig) and connector.words and isinstance(words, EmbeddingConfig):
            assert isinstance(encoder, VitConfig)
            return encoder, connector, words
    raise ConfigError(
        f"blip-2 retrieval: found the streams {sorted(model.streams)}, the backbone {model.backbone.use!r} and the "
        f"heads {[use for use, _ in heads]}, "
        "expected an image stream with the encoder 'vit', its class token a feature, and "
        "a 'qformer' with words: true, a text stream 'text' with 'embedding', no backbone, and the heads 'projection' "
        "and 'matching', at queries"
    )


def _size(parameters: int) -> Size:
    base = dict(blip2.size({"model_type": "opt"}, parameters).config)
    del base["text_config"]
    qformer = {**base["qformer_config"], "vocab_size": 30523, "use_qformer_text_input": True}
    return Size({**base, "architectures": [KIND], "qformer_config": qformer, "image_text_hidden_size": 256}, parameters)


BLIP2_RETRIEVAL = Architecture(
    "blip-2-retrieval",
    ("blip-2",),
    "BLIP-2, arXiv 2301.12597, section 3.2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={"blip2-itm-vit-g": _size(1_172_032_258), "blip2-itm-vit-g-coco": _size(1_172_032_258)},
    classes=(KIND,),
    float32=("query_tokens", "qformer"),
)
"""See the module."""
