"""wav2vec 2.0 checkpoints (``model_type: wav2vec2``) as an audio stream, with a ctc head where they have one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.compose.config import ModelConfig, StreamConfig
from polymodal.models.encoders.wav2vec2 import Wav2Vec2Config
from polymodal.models.heads.ctc import CtcConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.weights import HubConfigs, NameTable, Rule

_PARTS = {
    "attention_norm": "layer_norm",
    "attention.q_proj": "attention.q_proj",
    "attention.k_proj": "attention.k_proj",
    "attention.v_proj": "attention.v_proj",
    "attention.out_proj": "attention.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp.up_proj": "feed_forward.intermediate_dense",
    "mlp.down_proj": "feed_forward.output_dense",
}


@dataclass(frozen=True, slots=True)
class WaveFamily:
    """Published families that share the encoder and differ in names.

    Args:
        model_type: in ``config.json``, and the prefix of stored names below a head.
        class_prefix: of the reference library's classes.
        expected: what the translation assumes of ``config.json``.
        ignored: stored tensors of pretraining alone.
    """

    model_type: str
    class_prefix: str
    expected: Mapping[str, Any]
    ignored: tuple[str, ...] = ()

    def to_model(self, configs: HubConfigs) -> dict[str, Any]:
        """An audio stream without a backbone."""
        config = configs.config
        require(config, self.model_type, feat_extract_activation="gelu", **self.expected)
        allowed = {f"{self.class_prefix}{kind}" for kind in ("Model", "ForPreTraining", "ForCTC")}
        if not set(configs.classes) <= allowed:
            raise ConfigError(f"{self.model_type}: found {list(configs.classes)}, expected one of {sorted(allowed)}")
        stream = {"modality": "audio", "encoder": _encoder(config), "reader": wave_reader(configs.preprocessor)}
        heads = {}
        if f"{self.class_prefix}ForCTC" in configs.classes:
            heads = {"ctc": _ctc(configs)}
        return {"streams": {"audio": stream}, "backbone": "none", "heads": heads}

    def names(self, model: ModelConfig, stored: Collection[str]) -> NameTable:
        """Names of the bare model, below the family's prefix where a head stands beside it."""
        old = any(name.endswith("pos_conv_embed.conv.weight_g") for name in stored)
        table = _names("streams.audio.encoder.", "weight_" if old else "parametrizations.weight.original")
        is_below = any(name.startswith(f"{self.model_type}.") for name in stored)
        if is_below or (not stored and model.heads):
            table = table.below(f"{self.model_type}.")
        head = NameTable([Rule("heads.ctc.proj.{p}", "lm_head.{p}")], ignored=self.ignored)
        return table + head

    def to_hub(self, model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
        """``config.json``, ``preprocessor_config.json``, and the tokenizer's files where there is a ctc head."""
        stream = _only_stream(model, self.model_type)
        encoder, heads = stream.encoder, list(model.heads.values())
        config = {"model_type": self.model_type, **_config_of(encoder)}
        files = {"config.json": config, "preprocessor_config.json": preprocessor_of(stream)}
        if not heads:
            config["architectures"] = [f"{self.class_prefix}Model"]
        elif list(model.heads) == ["ctc"] and isinstance(heads[0], CtcConfig):
            config["architectures"] = [f"{self.class_prefix}ForCTC"]
            config |= {"vocab_size": len(heads[0].vocabulary), "pad_token_id": heads[0].blank}
            files |= _tokenizer_of(heads[0])
        else:
            raise ConfigError(f"{self.model_type}: found heads {list(model.heads)}, expected none or one called 'ctc'")
        return files

    def architecture(self, source: str, sizes: Mapping[str, Size]) -> Architecture:
        """The family as an architecture."""
        to_model: Callable[[HubConfigs], dict[str, Any]] = self.to_model
        return Architecture(
            self.model_type,
            (self.model_type,),
            source,
            to_model=to_model,
            names=self.names,
            to_hub=self.to_hub,
            sizes=sizes,
        )


def _encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    norm, stable = config.get("feat_extract_norm", "group"), config.get("do_stable_layer_norm", False)
    # Without a chance of masking the reference has no mask vector either.
    masks = config.get("apply_spec_augment", True)
    return {
        "use": "wav2vec2",
        "width": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "mlp_dim": config.get("intermediate_size", 3072),
        "activation": config.get("hidden_act", "gelu"),
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "dropout": config.get("hidden_dropout", 0.1),
        "conv_dims": config.get("conv_dim", (512,) * 7),
        "conv_kernels": config.get("conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
        "conv_strides": config.get("conv_stride", (5, 2, 2, 2, 2, 2, 2)),
        "conv_bias": config.get("conv_bias", False),
        "conv_norm": norm,
        "position_kernel": config.get("num_conv_pos_embeddings", 128),
        "position_groups": config.get("num_conv_pos_embedding_groups", 16),
        "pre_norm": stable,
        "mask_share": config.get("mask_time_prob", 0.05) if masks else 0.0,
        "mask_span": config.get("mask_time_length", 10),
        "mask_channel_share": config.get("mask_feature_prob", 0.0) if masks else 0.0,
        "mask_channel_span": config.get("mask_feature_length", 10),
    }


def _config_of(encoder: Wav2Vec2Config) -> dict[str, Any]:
    return {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_dim or 4 * encoder.width,
        "hidden_act": encoder.activation,
        "layer_norm_eps": encoder.norm_eps,
        "hidden_dropout": encoder.dropout,
        "attention_dropout": encoder.dropout,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "conv_dim": list(encoder.conv_dims),
        "conv_kernel": list(encoder.conv_kernels),
        "conv_stride": list(encoder.conv_strides),
        "num_feat_extract_layers": len(encoder.conv_dims),
        "conv_bias": encoder.conv_bias,
        "feat_extract_norm": encoder.conv_norm,
        "num_conv_pos_embeddings": encoder.position_kernel,
        "num_conv_pos_embedding_groups": encoder.position_groups,
        "do_stable_layer_norm": encoder.pre_norm,
        "mask_time_prob": encoder.mask_share,
        "mask_time_length": encoder.mask_span,
        "mask_feature_prob": encoder.mask_channel_share,
        "mask_feature_length": encoder.mask_channel_span,
    }


def wave_reader(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """A reader of samples from a ``preprocessor_config.json``."""
    return {
        "use": "audio",
        "representation": "wave",
        "rate_hz": preprocessor.get("sampling_rate", 16_000),
        "standardise": preprocessor.get("do_normalize", True),
    }


def preprocessor_of(stream: StreamConfig) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a stream that reads samples."""
    assert isinstance(stream.reader, AudioReaderConfig)
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "sampling_rate": stream.reader.rate_hz,
        "do_normalize": stream.reader.standardise,
        # The published code takes no mask for models whose first norm runs over time, and needs it for the others.
        "return_attention_mask": stream.encoder.conv_norm == "layer",
    }


def _only_stream(model: ModelConfig, family: str) -> StreamConfig:
    stream = model.streams.get("audio")
    if len(model.streams) != 1 or stream is None or not isinstance(stream.encoder, Wav2Vec2Config):
        raise ConfigError(
            f"{family}: found a model of other parts, expected one stream called 'audio' with the encoder 'wav2vec2'"
        )
    return stream


def _ctc(configs: HubConfigs) -> dict[str, Any]:
    """The alphabet of ``vocab.json``; ids that it does not name are called by their number."""
    tokenizer = configs.tokenizer
    require(tokenizer, "the tokenizer", do_lower_case=False, replace_word_delimiter_char=" ", target_lang=None)
    size = configs.config.get("vocab_size", 32)
    by_id = {index: token for token, index in configs.vocabulary.items()}
    vocabulary = [by_id.get(index, f"<{index}>") for index in range(size)]
    unknown = _spelled(tokenizer.get("unk_token", "<unk>"))
    return {
        "use": "ctc",
        "stream": "audio",
        "vocabulary": vocabulary,
        "blank": configs.config.get("pad_token_id") or 0,
        "delimiter": _spelled(tokenizer.get("word_delimiter_token", "|")),
        "unknown": unknown if unknown in vocabulary else None,
    }


def _spelled(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _tokenizer_of(head: CtcConfig) -> dict[str, dict[str, Any]]:
    config = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "pad_token": head.vocabulary[head.blank],
        "word_delimiter_token": head.delimiter,
        "do_lower_case": False,
    }
    names = {"unk_token": head.unknown or "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    # A name that is not in the vocabulary would be added to it there, and the head has no row for it.
    config |= {key: name if name in head.vocabulary else head.vocabulary[head.blank] for key, name in names.items()}
    return {
        "vocab.json": {token: index for index, token in enumerate(head.vocabulary)},
        "tokenizer_config.json": config,
    }


def _names(ours: str, weight_norm: str) -> NameTable:
    direction, gain = ("v", "g") if weight_norm == "weight_" else ("1", "0")
    conv, positions = "feature_extractor.conv_layers.{i}.", "encoder.pos_conv_embed.conv."
    return NameTable(
        [
            Rule(ours + "convolutions.{i}.conv.{p}", conv + "conv.{p}"),
            Rule(ours + "convolutions.{i}.norm.{p}", conv + "layer_norm.{p}"),
            Rule(ours + "input_norm.{p}", "feature_projection.layer_norm.{p}"),
            Rule(ours + "input_proj.{p}", "feature_projection.projection.{p}"),
            Rule(ours + "mask_embed", "masked_spec_embed"),
            Rule(ours + "positions.direction", positions + weight_norm + direction),
            Rule(ours + "positions.gain", positions + weight_norm + gain),
            Rule(ours + "positions.bias", positions + "bias"),
            Rule(ours + "embed_norm.{p}", "encoder.layer_norm.{p}"),
            Rule(ours + "transformer.final_norm.{p}", "encoder.layer_norm.{p}"),
            *block_rules(ours + "transformer.blocks", "encoder.layers", _PARTS),
        ],
        ignored=("masked_spec_embed",),
        # Some published files were saved before the vector existed.
        optional=(ours + "mask_embed",),
    )


_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_BASE_MODEL = {"architectures": ["Wav2Vec2Model"]}
SIZES = {
    "wav2vec2-base": Size(_BASE_MODEL, 94_371_712),
    "wav2vec2-base-960h": Size({"architectures": ["Wav2Vec2ForCTC"]}, 94_396_320),
    "wav2vec2-large": Size({**_BASE_MODEL, **_LARGE}, 315_428_992),
    "wav2vec2-large-960h-lv60": Size(
        {
            "architectures": ["Wav2Vec2ForCTC"],
            **_LARGE,
            "conv_bias": True,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
        },
        315_471_520,
    ),
}
"""Published: 95M and 317M with the quantiser of pretraining (arXiv 2006.11477, section 4.2)."""

WAV2VEC2 = WaveFamily(
    "wav2vec2",
    "Wav2Vec2",
    {"add_adapter": False, "adapter_attn_dim": None},
    ("quantizer.{rest}", "project_hid.{p}", "project_q.{p}"),
).architecture("wav2vec 2.0, arXiv 2006.11477, section 2", SIZES)
"""See the module."""
