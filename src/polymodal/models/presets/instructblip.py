"""InstructBLIP checkpoints (``model_type: instructblip``): BLIP-2 whose Q-Former reads the instruction as well.

The words of the instruction, in BERT's vocabulary, are a text stream of their own that the image stream's connector
reads; the language model reads them in its own vocabulary behind the queries.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.presets import blip2
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.blip import vision_names
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.language import stop_ids, tokenizer_of
from polymodal.models.presets.llama import LLAMA
from polymodal.models.presets.t5 import T5
from polymodal.models.weights import HubConfigs, NameTable, Rule

KIND, WORDS = "InstructBlipForConditionalGeneration", "qformer_tokenizer"
_TEXT = {"vocab_size": 30522, "max_position_embeddings": 512}
WORD_PARTS = {"mlp.up_proj": "intermediate.dense", "mlp.down_proj": "output.dense", "mlp_norm": "output.LayerNorm"}
"""Part of what words pass in a block of ours -> stored part of a Q-Former's."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream whose connector reads the stream of the instruction."""
    config = configs.config
    text = dict(config.get("text_config") or {"model_type": "opt"})
    qformer = {**blip2.QFORMER, **_TEXT, **(config.get("qformer_config") or {})}
    encoder = blip2.vision_encoder(config, "instructblip")
    language = blip2.language_model(text, "instructblip: text_config")
    chat = blip2.T5_CHAT if language["backbone"]["use"] == "encoder_decoder" else blip2.CHAT
    files = WORDS if configs.folder is None else str(configs.folder / WORDS)
    most = qformer["max_position_embeddings"]
    return {
        "streams": {
            "image": {
                "modality": "image",
                "encoder": encoder,
                "reader": image_reader(configs.preprocessor, encoder["image_size"], "BlipImageProcessor"),
                "connector": {**blip2.qformer_connector(config, qformer), "words": True},
                "enters": "sequence",
            },
            "instruction": {
                "modality": "text",
                "encoder": {
                    "use": "embedding",
                    "width": qformer["hidden_size"],
                    "vocab_size": qformer["vocab_size"],
                    "max_tokens": most,
                },
                "reader": {"use": "text", "tokenizer": files, "max_tokens": most, "add_special": True},
                "enters": "instruction",
            },
        },
        "backbone": {
            **language["backbone"],
            "chat": chat,
            "stop_ids": stop_ids(HubConfigs(text)) or stop_ids(configs),
        },
        "heads": {"text": language["head"]},
        "tokenizer": tokenizer_of(configs, language["rows"], blip2.placeholder(configs)),
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``InstructBlipForConditionalGeneration``."""
    image, connector = blip2.image_parts(model, "instructblip")
    ours, words = "streams.image.connector.", "streams.instruction.encoder."
    hub = "qformer.embeddings."
    own = NameTable(
        [
            Rule(ours + "query_norm.{p}", hub + "layernorm.{p}"),
            Rule(words + "token_embed.weight", hub + "word_embeddings.weight"),
            Rule(words + "positions.weight", hub + "position_embeddings.weight"),
            *block_rules(ours + "word_paths", "qformer.encoder.layer", WORD_PARTS),
        ],
        ignored=(hub + "position_ids",),
    )
    return (
        vision_names("streams.image.encoder.trunk.", "vision_model.", image.width)
        + own
        + blip2.qformer_names(ours, connector)
        + blip2.language_names(model, stored)
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, ``preprocessor_config.json``, ``processor_config.json`` and ``generation_config.json``."""
    encoder, connector = blip2.image_parts(model, "instructblip")
    words = model.streams["instruction"].encoder if set(model.streams) == {"image", "instruction"} else None
    if not isinstance(words, EmbeddingConfig) or not connector.words:
        raise ConfigError(
            f"instructblip: found the streams {sorted(model.streams)} and words: {connector.words}, expected 'image' "
            "and 'instruction' with the encoder 'embedding', which the connector reads"
        )
    files = blip2.hub_files(model, vocabulary, encoder, connector)
    read = {"vocab_size": words.vocab_size, "max_position_embeddings": words.max_tokens}
    config = {
        **files["config.json"],
        "model_type": "instructblip",
        "architectures": [KIND],
        "vision_config": {**files["config.json"]["vision_config"], "model_type": "instructblip_vision_model"},
        "qformer_config": {**files["config.json"]["qformer_config"], **read, "model_type": "instructblip_qformer"},
    }
    processor = {**files["processor_config.json"], "processor_class": "InstructBlipProcessor"}
    pixels = image_preprocessor(model.streams["image"].reader, "BlipImageProcessor")
    return {
        **files,
        "config.json": config,
        "processor_config.json": processor,
        "preprocessor_config.json": {**pixels, "processor_class": "InstructBlipProcessor"},
    }


def _size(text: dict[str, Any], parameters: int) -> Size:
    config = dict(blip2.size(text, parameters).config)
    config["qformer_config"] = {**config["qformer_config"], "vocab_size": 30523}
    return Size({**config, "model_type": "instructblip", "architectures": [KIND]}, parameters)


INSTRUCTBLIP = Architecture(
    "instructblip",
    ("instructblip",),
    "InstructBLIP, arXiv 2305.06500, section 2.3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "instructblip-vicuna-7b": _size({**LLAMA.sizes["vicuna-7b-v1.5"].config, "vocab_size": 32001}, 7_913_210_624),
        "instructblip-vicuna-13b": _size(
            {**LLAMA.sizes["vicuna-13b-v1.5"].config, "vocab_size": 32001}, 14_191_448_832
        ),
        "instructblip-flan-t5-xl": _size(dict(T5.sizes["flan-t5-xl"].config), 4_022_969_088),
        "instructblip-flan-t5-xxl": _size(dict(T5.sizes["flan-t5-xxl"].config), 12_310_119_168),
    },
    float32=("query_tokens", "wo"),
)
"""See the module."""
