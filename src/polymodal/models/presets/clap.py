"""CLAP checkpoints (``model_type: clap``): an audio and a text tower in one space."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.htsat import HtsatConfig
from polymodal.models.encoders.text_transformer import TextTransformerConfig
from polymodal.models.heads.table import ProjectionConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.bert import bert_names
from polymodal.models.presets.stacks import stack_config, stack_fields
from polymodal.models.weights import HubConfigs, NameTable, Rule

_TEXT: dict[str, Any] = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 1,
}
_AUDIO: dict[str, Any] = {
    "window_size": 8,
    "num_mel_bins": 64,
    "spec_size": 256,
    "hidden_act": "gelu",
    "patch_size": 4,
    "hidden_size": 768,
    "depths": (2, 2, 6, 2),
    "num_attention_heads": (4, 8, 16, 32),
    "enable_fusion": False,
    "mlp_ratio": 4.0,
    "aff_block_r": 4,
    "patch_embeds_hidden_size": 96,
}
_BLOCK = {
    "attention_norm": "layernorm_before",
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.out_proj": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
}
_FUSION, _CROP = "fusion", "rand_trunc"


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An audio and a text stream and the space of both."""
    config = configs.config
    audio, text = (dict(config.get(f"{part}_config") or {}) for part in ("audio", "text"))
    encoder, tower = audio_encoder(audio), text_encoder(text)
    reader: dict[str, Any] = {"use": "text", "max_tokens": tower["max_tokens"], "add_special": True}
    tokenizer: dict[str, Any] = {}
    if configs.folder is None:
        tokenizer = {"vocab_size": tower["vocab_size"], "rows": tower["vocab_size"]}
    else:
        reader["tokenizer"] = str(configs.folder)
    init = config.get("logit_scale_init_value", 1 / 0.07)
    head = {
        "use": "projection",
        "dim": config.get("projection_dim", 512),
        "streams": ("audio", "text"),
        "hidden": activation(config.get("projection_hidden_act", "relu")),
        "query_scales": True,
        "temperature": float(f"{1 / init:.12g}"),
        "max_scale": None,
        "bias": None,
    }
    return {
        "streams": {
            "audio": {"modality": "audio", "encoder": encoder, "reader": audio_reader(configs.preprocessor, encoder)},
            "text": {"modality": "text", "encoder": tower, "reader": reader},
        },
        "backbone": "none",
        "heads": {"projection": head},
        "tokenizer": tokenizer,
    }


def audio_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder of an ``audio_config``."""
    given = {**_AUDIO, **config}
    patch, widest = given["patch_size"], given["patch_embeds_hidden_size"] * 2 ** (len(given["depths"]) - 1)
    require(
        given,
        "clap",
        patch_stride=(patch, [patch, patch], (patch, patch)),
        patch_embed_input_channels=1,
        flatten_patch_embeds=True,
        enable_patch_layer_norm=True,
        qkv_bias=True,
        layer_norm_eps=1e-5,
        hidden_size=widest,
        fusion_type=(None, "aff_2d"),
    )
    return {
        "use": "htsat",
        "width": widest,
        "num_mels": given["num_mel_bins"],
        "image_size": given["spec_size"],
        "patch_size": patch,
        "window": given["window_size"],
        "depths": given["depths"],
        "heads": given["num_attention_heads"],
        "mlp_ratio": given["mlp_ratio"],
        "activation": activation(given["hidden_act"]),
        "fused": given["enable_fusion"],
        "fusion_ratio": given["aff_block_r"],
    }


def text_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoBERTa from a ``text_config``: BERT whose positions begin behind the pad token's id."""
    given = {**_TEXT, **config}
    first = given["pad_token_id"] + 1
    return {
        "use": "text_transformer",
        "vocab_size": given["vocab_size"],
        "max_tokens": given["max_position_embeddings"] - first,
        "first_position": first,
        **stack_fields(given, "clap"),
        "pre_norm": False,
        "embed_norm": True,
        "segments": given["type_vocab_size"],
        "pool": "first",
        "pooled_proj": given["hidden_size"],
        "pooled_tanh": True,
    }


def audio_reader(preprocessor: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The reader of a ``ClapFeatureExtractor``.

    Where the published code draws a place in a long recording at random, all clips of it are heard, and their vectors
    averaged; the crops of a fused model are taken from the middle of their thirds.
    """
    fused = encoder["fused"]
    require(preprocessor, "clap", truncation=_FUSION if fused else _CROP, padding=("repeatpad", "pad"), top_db=None)
    rate = preprocessor.get("sampling_rate", 48_000)
    return {
        "use": "audio",
        "rate_hz": rate,
        "num_mels": preprocessor.get("feature_size", encoder["num_mels"]),
        "mel_scale": "htk" if fused else "slaney",
        "mel_unit_area": not fused,
        "min_hz": preprocessor.get("frequency_min", 0),
        "max_hz": preprocessor.get("frequency_max", 14_000),
        "levels": "decibels",
        "end_frame": True,
        "window_s": preprocessor.get("fft_window_size", 1024) / rate,
        "hop_s": preprocessor.get("hop_length", 480) / rate,
        "clip_s": preprocessor.get("max_length_s", 10),
        "repeat": preprocessor.get("padding", "repeatpad") == "repeatpad",
        "pad_clip": True,
        "views": fused,
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``ClapModel``."""
    return (
        audio_names("streams.audio.encoder.", "audio_model.audio_encoder.")
        + bert_names("streams.text.encoder.", "text_model.")
        + NameTable(
            [
                Rule("heads.projection.projs.{p}.first.{q}", "{p}_projection.linear1.{q}"),
                Rule("heads.projection.projs.{p}.second.{q}", "{p}_projection.linear2.{q}"),
                Rule("heads.projection.log_scales.audio", "logit_scale_a"),
                Rule("heads.projection.log_scales.text", "logit_scale_t"),
            ],
            ignored=("text_model.embeddings.token_type_ids",),
        )
    )


def audio_names(ours: str, hub: str) -> NameTable:
    """Names of the audio tower.

    Args:
        ours: path of the encoder with a dot at its end.
        hub: path of the stored one.
    """
    patches, block = hub + "patch_embed.", hub + "layers.{i}.blocks.{j}."
    return NameTable(
        [
            Rule(ours + "band_norm.{p}", hub + "batch_norm.{p}"),
            Rule(ours + "embedding.proj.{p}", patches + "proj.{p}"),
            Rule(ours + "embedding.norm.{p}", patches + "norm.{p}"),
            Rule(ours + "embedding.crop_proj.{p}", patches + "mel_conv2d.{p}"),
            Rule(ours + "embedding.fusion.local.{i}.{p}", patches + "fusion_model.local_att.{i}.{p}"),
            Rule(ours + "embedding.fusion.whole.{i}.{p}", patches + "fusion_model.global_att.{i}.{p}"),
            *(
                Rule(f"{ours}stages.{{i}}.blocks.{{j}}.{mine}.{{p}}", f"{block}{theirs}.{{p}}")
                for mine, theirs in _BLOCK.items()
            ),
            Rule(
                ours + "stages.{i}.blocks.{j}.attention.bias_table",
                block + "attention.self.relative_position_bias_table",
            ),
            Rule(ours + "stages.{i}.merge.norm.{p}", hub + "layers.{i}.downsample.norm.{p}"),
            Rule(ours + "stages.{i}.merge.proj.{p}", hub + "layers.{i}.downsample.reduction.{p}"),
            Rule(ours + "final_norm.{p}", hub + "norm.{p}"),
        ],
        ignored=(block + "attention.self.relative_position_index",),
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of ``ClapModel``."""
    audio, text = (getattr(model.streams.get(name), "encoder", None) for name in ("audio", "text"))
    head = model.heads.get("projection")
    fits = isinstance(audio, HtsatConfig) and isinstance(text, TextTransformerConfig) and len(model.heads) == 1
    if len(model.streams) != 2 or not fits or not isinstance(head, ProjectionConfig) or not head.query_scales:
        raise ConfigError(
            f"clap: found the streams {sorted(model.streams)} and the heads {sorted(model.heads)}, expected audio with "
            "'htsat', text with 'text_transformer', and a projection head with query_scales"
        )
    config = {
        "model_type": "clap",
        "architectures": ["ClapModel"],
        "projection_dim": head.dim,
        "projection_hidden_act": head.hidden,
        "logit_scale_init_value": 1 / (head.temperature or 1.0),
        "audio_config": _audio_config(audio),
        "text_config": _text_config(text),
    }
    reader = model.streams["audio"].reader
    assert isinstance(reader, AudioReaderConfig)
    return {"config.json": config, "preprocessor_config.json": _preprocessor(reader)}


def _audio_config(encoder: Any) -> dict[str, Any]:
    return {
        "model_type": "clap_audio_model",
        "hidden_size": encoder.width,
        "patch_embeds_hidden_size": encoder.stage_width(0),
        "num_mel_bins": encoder.num_mels,
        "spec_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "patch_stride": [encoder.patch_size, encoder.patch_size],
        "window_size": encoder.window,
        "depths": list(encoder.depths),
        "num_attention_heads": list(encoder.heads),
        "mlp_ratio": encoder.mlp_ratio,
        "hidden_act": hub_activation(encoder.activation),
        "enable_fusion": encoder.fused,
        "fusion_type": "aff_2d" if encoder.fused else None,
        "aff_block_r": encoder.fusion_ratio,
    }


def _text_config(encoder: Any) -> dict[str, Any]:
    return {
        "model_type": "clap_text_model",
        "vocab_size": encoder.vocab_size,
        **stack_config(encoder),
        "max_position_embeddings": encoder.max_tokens + encoder.first_position,
        "type_vocab_size": encoder.segments,
        "pad_token_id": encoder.first_position - 1,
    }


def _preprocessor(reader: AudioReaderConfig) -> dict[str, Any]:
    seconds = reader.clip_s or 10
    return {
        "feature_extractor_type": "ClapFeatureExtractor",
        "feature_size": reader.num_mels,
        "sampling_rate": reader.rate_hz,
        "hop_length": reader.hop,
        "fft_window_size": reader.window,
        "max_length_s": int(seconds) if float(seconds).is_integer() else seconds,
        "nb_max_samples": reader.clip,
        "frequency_min": reader.min_hz,
        "frequency_max": reader.max_hz,
        "truncation": _FUSION if reader.views else _CROP,
        "padding": "repeatpad" if reader.repeat else "pad",
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _size(parameters: int, **audio: Any) -> Size:
    return Size({"architectures": ["ClapModel"], "audio_config": audio, "text_config": {}}, parameters)


CLAP = Architecture(
    "clap",
    ("clap",),
    "CLAP, arXiv 2211.06687, section 2; HTS-AT, arXiv 2202.00874, section 2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # As published, rounded: 153M, 154M, 194M.
        "clap-htsat-unfused": _size(153_492_890),
        "clap-htsat-fused": _size(153_507_530, enable_fusion=True, fusion_type="aff_2d"),
        "larger-clap-general": _size(
            193_913_882,
            patch_embeds_hidden_size=128,
            hidden_size=1024,
            depths=[2, 2, 12, 2],
            num_attention_heads=[4, 8, 16, 32],
        ),
    },
)
"""See the module."""
