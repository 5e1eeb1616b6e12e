"""Whisper checkpoints (``model_type: whisper``): an audio stream that a text decoder looks at."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.whisper import FRAMES_PER_FEATURE, HOP_S, WhisperConfig
from polymodal.models.heads.next_token import NextTokenConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.weights import HubConfigs, NameTable, Rule

_PARTS = {
    "attention_norm": "self_attn_layer_norm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
_CROSS_PARTS = {
    "cross_norm": "encoder_attn_layer_norm",
    "cross_attention.q_proj": "encoder_attn.q_proj",
    "cross_attention.k_proj": "encoder_attn.k_proj",
    "cross_attention.v_proj": "encoder_attn.v_proj",
    "cross_attention.out_proj": "encoder_attn.out_proj",
}
_MULTILINGUAL_IDS = 51_865
"""Vocabularies from this size on hold the tokens of all languages."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An audio stream, cross-attended by every block of a decoder with learned positions."""
    config, generation = configs.config, configs.generation
    require(config, "whisper", scale_embedding=False, use_weighted_layer_sum=False)
    rows = config.get("vocab_size", 51_865)
    told = generation.get("is_multilingual", rows >= _MULTILINGUAL_IDS)
    activation = config.get("activation_function", "gelu")
    encoder = {
        "use": "whisper",
        "width": config.get("d_model", 384),
        "depth": config.get("encoder_layers", 4),
        "heads": config.get("encoder_attention_heads", 6),
        "mlp_dim": config.get("encoder_ffn_dim", 1536),
        "activation": activation,
        "dropout": config.get("dropout", 0.0),
        "num_mels": config.get("num_mel_bins", 80),
        "max_features": config.get("max_source_positions", 1500),
    }
    transformer = {
        "width": config.get("d_model", 384),
        "depth": config.get("decoder_layers", 4),
        "heads": config.get("decoder_attention_heads", 6),
        "mlp_dim": config.get("decoder_ffn_dim", 1536),
        "activation": activation,
        "dropout": config.get("dropout", 0.0),
        "key_bias": False,
    }
    stream = {
        "modality": "audio",
        "encoder": encoder,
        "reader": _reader(configs.preprocessor, encoder),
        "enters": "cross_attention",
    }
    return {
        "streams": {"audio": stream},
        "backbone": {
            "use": "decoder",
            "transformer": transformer,
            "positions": "learned",
            "max_tokens": config.get("max_target_positions", 448),
            "chat": "whisper" if told else "whisper.en",
        },
        "heads": {
            "text": {
                "use": "next_token",
                "suppress": _ids("suppress_tokens", generation, config),
                "suppress_first": _ids("begin_suppress_tokens", generation, config),
            }
        },
        "tokenizer": {"use": "file", "path": str(configs.folder or "whisper"), "rows": rows},
    }


def _ids(key: str, generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that are not generated; in older folders ``config.json`` says so."""
    return tuple((generation if key in generation else config).get(key) or ())


def _reader(preprocessor: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    require(preprocessor, "whisper", dither=0.0, do_normalize=False, padding_value=0.0)
    rate = preprocessor.get("sampling_rate", 16_000)
    whole_clip_s = encoder["max_features"] * FRAMES_PER_FEATURE * HOP_S
    return {
        "use": "audio",
        "rate_hz": rate,
        "num_mels": preprocessor.get("feature_size", encoder["num_mels"]),
        "window_s": preprocessor.get("n_fft", 400) / rate,
        "hop_s": preprocessor.get("hop_length", 160) / rate,
        "clip_s": preprocessor.get("chunk_length", whole_clip_s),
        "pad_clip": True,
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``WhisperForConditionalGeneration``; of the bare model where nothing stands before ``encoder.``."""
    encoder, decoder = "streams.audio.encoder.", "backbone."
    table = NameTable(
        [
            Rule(encoder + "conv1.conv.{p}", "encoder.conv1.{p}"),
            Rule(encoder + "conv2.conv.{p}", "encoder.conv2.{p}"),
            Rule(encoder + "positions_ND", "encoder.embed_positions.weight"),
            *block_rules(encoder + "transformer.blocks", "encoder.layers", _PARTS),
            Rule(encoder + "transformer.final_norm.{p}", "encoder.layer_norm.{p}"),
            Rule(decoder + "embed_tokens.weight", "decoder.embed_tokens.weight"),
            Rule(decoder + "embed_positions.weight", "decoder.embed_positions.weight"),
            *block_rules(decoder + "transformer.blocks", "decoder.layers", _PARTS | _CROSS_PARTS),
            Rule(decoder + "transformer.final_norm.{p}", "decoder.layer_norm.{p}"),
        ]
    )
    is_bare = bool(stored) and not any(name.startswith("model.") for name in stored)
    table = table if is_bare else table.below("model.")
    # The head is the token embedding; older files hold it twice.
    return table + NameTable([], ignored=("proj_out.weight",))


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, ``preprocessor_config.json`` and ``generation_config.json``."""
    stream, backbone, head = model.streams.get("audio"), model.backbone, model.heads.get("text")
    is_whisper = (
        len(model.streams) == len(model.heads) == 1
        and stream is not None
        and isinstance(stream.encoder, WhisperConfig)
        and isinstance(backbone, DecoderConfig)
        and isinstance(head, NextTokenConfig)
    )
    if not is_whisper or stream is None:
        raise ConfigError("whisper: found other parts, expected an audio stream 'audio' that a decoder looks at")
    encoder, transformer, reader = stream.encoder, backbone.transformer, stream.reader
    assert isinstance(reader, AudioReaderConfig) and isinstance(head, NextTokenConfig)
    ids = _special_ids(vocabulary)
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": model.tokenizer.rows or vocabulary.size,
        "d_model": encoder.width,
        "encoder_layers": encoder.depth,
        "encoder_attention_heads": encoder.heads,
        "encoder_ffn_dim": encoder.mlp_dim or 4 * encoder.width,
        "decoder_layers": transformer.depth,
        "decoder_attention_heads": transformer.heads,
        "decoder_ffn_dim": transformer.mlp_dim or 4 * transformer.width,
        "activation_function": encoder.activation,
        "dropout": encoder.dropout,
        "num_mel_bins": encoder.num_mels,
        "max_source_positions": encoder.max_features,
        "max_target_positions": backbone.max_tokens,
        "num_hidden_layers": encoder.depth,
        "scale_embedding": False,
        **ids,
    }
    return {
        "config.json": config,
        "preprocessor_config.json": _preprocessor(reader),
        "generation_config.json": {**_generation(backbone, head, vocabulary), **ids},
    }


def _special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    end, start = vocabulary.controls.get("<|endoftext|>"), vocabulary.controls.get("<|startoftranscript|>")
    found = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    return {key: id for key, id in found.items() if id is not None}


def _preprocessor(reader: AudioReaderConfig) -> dict[str, Any]:
    seconds = reader.clip_s or 30
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": reader.num_mels,
        "sampling_rate": reader.rate_hz,
        "hop_length": reader.hop,
        "n_fft": reader.window,
        "chunk_length": int(seconds) if float(seconds).is_integer() else seconds,
        "n_samples": reader.clip,
        "nb_max_frames": (reader.clip or 0) // reader.hop,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _generation(backbone: DecoderConfig, head: NextTokenConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    controls, told = vocabulary.controls, backbone.chat == "whisper"
    generation: dict[str, Any] = {
        "is_multilingual": told,
        "max_length": backbone.max_tokens,
        "suppress_tokens": list(head.suppress),
        "begin_suppress_tokens": list(head.suppress_first),
        "return_timestamps": False,
    }
    if "<|notimestamps|>" in controls:
        generation["no_timestamps_token_id"] = controls["<|notimestamps|>"]
    if told:
        codes = {name: id for name, id in controls.items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", name)}
        generation["lang_to_id"] = codes
        tasks = {name: controls.get(f"<|{name}|>") for name in ("transcribe", "translate")}
        generation["task_to_id"] = {name: id for name, id in tasks.items() if id is not None}
    return generation


def _size(width: int, depth: int, heads: int, parameters: int, **more: Any) -> Size:
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "d_model": width,
        "encoder_layers": depth,
        "decoder_layers": depth,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "vocab_size": 51_865,
        **more,
    }
    # The encoder's fixed table of 1,500 positions is a parameter of the published model.
    return Size(config, parameters, {"feature_size": config.get("num_mel_bins", 80)}, unused=1500 * width)


_V3 = {"num_mel_bins": 128, "vocab_size": 51_866}
WHISPER = Architecture(
    "whisper",
    ("whisper",),
    "Whisper, arXiv 2212.04356, section 2.2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # As published, rounded: 39M, 74M, 244M, 769M, 1550M, 1550M, 809M.
        "whisper-tiny": _size(384, 4, 6, 37_760_640),
        "whisper-base": _size(512, 6, 8, 72_593_920),
        "whisper-small": _size(768, 12, 12, 241_734_912),
        "whisper-medium": _size(1024, 24, 16, 763_857_920),
        "whisper-large-v2": _size(1280, 32, 20, 1_543_304_960),
        "whisper-large-v3": _size(1280, 32, 20, 1_543_490_560, **_V3),
        "whisper-large-v3-turbo": _size(1280, 32, 20, 808_878_080, **_V3, decoder_layers=4),
    },
)
"""See the module."""
