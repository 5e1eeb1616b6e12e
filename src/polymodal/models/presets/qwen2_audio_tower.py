"""The audio tower of Qwen2-Audio, alone (``model_type: qwen2_audio_encoder``) and as a part of the language model.

``audio_tower.conv1...``, ``multi_modal_projector.linear...``; functions take the paths, so that the language model's
translation calls them with its own prefixes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.whisper_pooled import CONTEXT, HOP_S, WhisperPooledConfig
from polymodal.models.presets.activations import activation, hub_activation
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
CONNECTOR = {"use": "linear"}
"""``multi_modal_projector``: the pooling is the tower's, so one linear map is left."""


def tower_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder of an ``audio_config``."""
    require(config, "qwen2_audio", scale_embedding=False)
    return {
        "use": "whisper_pooled",
        "width": config.get("d_model", 1280),
        "depth": config.get("encoder_layers", 32),
        "heads": config.get("encoder_attention_heads", 20),
        "mlp_dim": config.get("encoder_ffn_dim", 5120),
        "activation": activation(config.get("activation_function", "gelu")),
        "dropout": config.get("dropout", 0.0),
        "num_mels": config.get("num_mel_bins", 128),
        "max_features": config.get("max_source_positions", 1500),
    }


def tower_config(encoder: WhisperPooledConfig) -> dict[str, Any]:
    """The ``audio_config`` of an encoder: the inverse of :func:`tower_encoder`."""
    return {
        "model_type": "qwen2_audio_encoder",
        "d_model": encoder.width,
        "encoder_layers": encoder.depth,
        "encoder_attention_heads": encoder.heads,
        "encoder_ffn_dim": encoder.mlp_dim or 4 * encoder.width,
        "activation_function": hub_activation(encoder.activation),
        "dropout": encoder.dropout,
        "attention_dropout": encoder.dropout,
        "num_mel_bins": encoder.num_mels,
        "max_source_positions": encoder.max_features,
        "scale_embedding": False,
    }


def tower_reader(preprocessor: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The reader of a ``preprocessor_config.json`` (a ``WhisperFeatureExtractor``).

    A recording longer than a clip becomes several, where the published code cuts it.
    """
    require(preprocessor, "qwen2_audio", dither=0.0, do_normalize=False, padding_value=0.0)
    rate = preprocessor.get("sampling_rate", 16_000)
    return {
        "use": "audio",
        "rate_hz": rate,
        "num_mels": preprocessor.get("feature_size", encoder["num_mels"]),
        "window_s": preprocessor.get("n_fft", 400) / rate,
        "hop_s": preprocessor.get("hop_length", 160) / rate,
        "clip_s": preprocessor.get("chunk_length", encoder["max_features"] * 2 * HOP_S),
        "pad_clip": True,
        "keep_filling": CONTEXT,
    }


def tower_preprocessor(reader: AudioReaderConfig) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a reader: the inverse of :func:`tower_reader`."""
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
        "return_attention_mask": True,
    }


def tower_names(ours: str, hub: str) -> NameTable:
    """Names of the tower.

    Args:
        ours: path of the encoder, ``streams.audio.encoder.``.
        hub: path of the stored tower, ``audio_tower.`` or "".
    """
    return NameTable(
        [
            Rule(ours + "conv1.conv.{p}", hub + "conv1.{p}"),
            Rule(ours + "conv2.conv.{p}", hub + "conv2.{p}"),
            Rule(ours + "positions_ND", hub + "embed_positions.weight"),
            *block_rules(ours + "transformer.blocks", hub + "layers", _PARTS),
            Rule(ours + "final_norm.{p}", hub + "layer_norm.{p}"),
        ]
    )


def projector_names(ours: str, hub: str) -> NameTable:
    """Names of the map between tower and language model.

    Args:
        ours: path of the connector, ``streams.audio.connector.``.
        hub: path of the stored map, ``multi_modal_projector.``.
    """
    return NameTable([Rule(ours + "stack.layers.0.{p}", hub + "linear.{p}")])


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An audio stream without a backbone."""
    encoder = tower_encoder(configs.config)
    stream = {"modality": "audio", "encoder": encoder, "reader": tower_reader(configs.preprocessor, encoder)}
    return {"streams": {"audio": stream}, "backbone": "none", "heads": {}}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``Qwen2AudioEncoder``."""
    return tower_names("streams.audio.encoder.", "")


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of the tower alone."""
    stream = model.streams.get("audio")
    if len(model.streams) != 1 or model.heads or stream is None or not isinstance(stream.encoder, WhisperPooledConfig):
        raise ConfigError(
            "qwen2_audio_encoder: found other parts, expected one stream 'audio' with the encoder 'whisper_pooled'"
        )
    assert isinstance(stream.reader, AudioReaderConfig)
    config = {**tower_config(stream.encoder), "architectures": ["Qwen2AudioEncoder"]}
    return {"config.json": config, "preprocessor_config.json": tower_preprocessor(stream.reader)}


QWEN2_AUDIO_TOWER = Architecture(
    "qwen2_audio_encoder",
    ("qwen2_audio_encoder",),
    "Qwen2-Audio, arXiv 2407.10759, section 2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "qwen2-audio-tower": Size(
            {"architectures": ["Qwen2AudioEncoder"]}, 636_968_960, {"feature_size": 128}, unused=1500 * 1280
        ),
    },
)
"""See the module. Published: 637M, as Whisper large-v3's encoder."""
