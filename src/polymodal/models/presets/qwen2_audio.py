"""Qwen2-Audio checkpoints (``model_type: qwen2_audio``): an audio tower, a linear map and a language model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.connectors.projections import LinearConfig
from polymodal.models.encoders.whisper_pooled import WhisperPooledConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.language import chat_of, stop_ids, tokenizer_of
from polymodal.models.presets.language_table import find_language
from polymodal.models.presets.llava import language_of
from polymodal.models.presets.qwen2_audio_tower import (
    CONNECTOR,
    projector_names,
    tower_config,
    tower_encoder,
    tower_names,
    tower_preprocessor,
    tower_reader,
)
from polymodal.models.weights import HubConfigs, NameTable

_AUDIO_TOKEN = "<|AUDIO|>"


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An audio stream among the text of a decoder."""
    config = configs.config
    encoder = tower_encoder(config.get("audio_config") or {})
    text = dict(config.get("text_config") or {})
    language = find_language(text.get("model_type", "qwen2"), "qwen2_audio: text_config")
    audio_token = configs.processor.get("audio_token") or configs.tokenizer.get("audio_token") or _AUDIO_TOKEN
    chat = chat_of(configs)
    return {
        "streams": {
            "audio": {
                "modality": "audio",
                "encoder": encoder,
                "reader": tower_reader(configs.preprocessor, encoder),
                "connector": CONNECTOR,
                "enters": "sequence",
            }
        },
        "backbone": {
            **language.backbone(text),
            "chat": chat if isinstance(chat, str) else {**chat, "start": True, "marks": {"audio": audio_token}},
            "stop_ids": stop_ids(configs) or stop_ids(HubConfigs(text)),
        },
        "heads": {"text": {"use": "next_token", "tied": language.is_tied(text)}},
        "tokenizer": tokenizer_of(configs, int(text.get("vocab_size", language.rows)), audio_token),
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``Qwen2AudioForConditionalGeneration``."""
    language, head = language_of(model.backbone), next(iter(model.heads.values()))
    return (
        tower_names("streams.audio.encoder.", "audio_tower.")
        + projector_names("streams.audio.connector.", "multi_modal_projector.")
        + language.names(model.backbone, "language_model." + language.body)
        + language.head_names(head.tied, "language_model.lm_head.weight")
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, ``preprocessor_config.json``, ``processor_config.json`` and ``generation_config.json``."""
    audio, heads = model.streams.get("audio"), list(model.heads.values())
    if len(model.streams) != 1 or audio is None or [head.use for head in heads] != ["next_token"]:
        raise ConfigError(
            f"qwen2_audio: found the streams {sorted(model.streams)} and the heads {[head.use for head in heads]}, "
            "expected an audio stream and a next_token head"
        )
    encoder, connector = audio.encoder, audio.connector
    is_known = isinstance(encoder, WhisperPooledConfig) and isinstance(connector, LinearConfig)
    if not is_known or not isinstance(audio.reader, AudioReaderConfig):
        raise ConfigError(
            f"qwen2_audio: found the encoder {encoder.use!r} and the connector {getattr(connector, 'use', None)!r}, "
            "expected 'whisper_pooled' and 'linear'"
        )
    language = language_of(model.backbone)
    audio_token = model.tokenizer.media or _AUDIO_TOKEN
    special = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": list(model.backbone.stop_ids) or vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    config = {
        "model_type": "qwen2_audio",
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_config": tower_config(encoder),
        "text_config": {
            "model_type": language.model_types[0],
            "tie_word_embeddings": heads[0].tied,
            **special,
            **language.config(model.backbone, model.tokenizer.rows or vocabulary.size),
        },
        "tie_word_embeddings": heads[0].tied,
        "audio_token_index": vocabulary.controls.get(audio_token, 0),
    }
    return {
        "config.json": config,
        "preprocessor_config.json": tower_preprocessor(audio.reader),
        "processor_config.json": {"processor_class": "Qwen2AudioProcessor", "audio_token": audio_token},
        "generation_config.json": special,
    }


_TEXT = {
    "model_type": "qwen2",
    "intermediate_size": 11008,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "vocab_size": 156032,
}
_CONFIG = {
    "model_type": "qwen2_audio",
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "audio_config": {"model_type": "qwen2_audio_encoder"},
    "text_config": _TEXT,
}

QWEN2_AUDIO = Architecture(
    "qwen2_audio",
    ("qwen2_audio",),
    "Qwen2-Audio, arXiv 2407.10759, section 2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={"qwen2-audio-7b": Size(_CONFIG, 8_397_094_912, {"feature_size": 128}, unused=1500 * 1280)},
)
"""See the module. Published: 8.4B."""
