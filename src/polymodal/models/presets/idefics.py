"""Idefics checkpoints (``model_type: idefics``): Flamingo on Llama, with gated cross-attention and a resampler."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.image import ImageReaderConfig
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.connectors.perceiver import PerceiverConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.entries.table import CrossAttentionEntry
from polymodal.models.heads.next_token import NextTokenConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.language import chat_of, stop_ids, tokenizer_of
from polymodal.models.presets.llama import llama_config, llama_like, llama_names
from polymodal.models.presets.towers import vision_names
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

MEDIA, AROUND = "<image>", "<fake_token_around_image>"
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "alpha_type": "float",
    "use_resampler": False,
    "tie_word_embeddings": False,
}
_VISION: dict[str, Any] = {
    "embed_dim": 768,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
_PERCEIVER: dict[str, Any] = {
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "qk_layer_norms_perceiver": False,
}
_GATED = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "cross_attn.q_proj",
    "attention.k_proj": "cross_attn.k_proj",
    "attention.v_proj": "cross_attn.v_proj",
    "attention.out_proj": "cross_attn.o_proj",
    "attention.q_norm": "cross_attn.q_layer_norm",
    "attention.k_norm": "cross_attn.k_layer_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
_RESAMPLER = {
    "feature_norm": "0.context_layer_norm",
    "latent_norm": "0.latents_layer_norm",
    "attention.q_proj": "0.q_proj",
    "attention.k_proj": "0.k_proj",
    "attention.v_proj": "0.v_proj",
    "attention.out_proj": "0.output_proj",
    "attention.q_norm": "0.q_layer_norm",
    "attention.k_norm": "0.k_layer_norm",
    "mlp_norm": "1.ln",
    "mlp.up_proj": "1.fc",
    "mlp.down_proj": "1.c_proj",
}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Images that a decoder of Llama's kind looks at, each token at the latest one."""
    config = {**_DEFAULTS, **configs.config}
    vision = {**_VISION, **_part(config, "vision_config")}
    resampler = {**_PERCEIVER, **_part(config, "perceiver_config")}
    require(config, "idefics", dropout=0.0, alpha_type=("float", "vector"))
    require(vision, "idefics", attention_dropout=0.0, num_channels=3)
    if config["num_hidden_layers"] % config["cross_layer_interval"]:
        raise ConfigError(
            f"idefics: found {config['num_hidden_layers']} layers and cross_layer_interval "
            f"{config['cross_layer_interval']}, expected a multiple"
        )
    stream: dict[str, Any] = {
        "modality": "image",
        "encoder": _encoder(vision),
        "reader": image_reader(_square(configs.preprocessor), vision["image_size"], "BlipImageProcessor"),
        "enters": {
            "use": "cross_attention",
            "every": config["cross_layer_interval"],
            "gate": "tanh_channel" if config["alpha_type"] == "vector" else "tanh",
            "mask": "latest_media",
            "around": AROUND,
            "qk_norm": config["qk_layer_norms"],
        },
    }
    if config["use_resampler"]:
        stream["connector"] = _connector(resampler, vision["embed_dim"])
    added = config["additional_vocab_size"]
    rows = config["vocab_size"] + added
    return {
        "streams": {"image": stream},
        "backbone": {
            **llama_like(config, "idefics", {}),
            "added_rows": added,
            "chat": chat_of(configs),
            "stop_ids": stop_ids(configs),
        },
        "heads": {"text": {"use": "next_token", "tied": config["tie_word_embeddings"]}},
        "tokenizer": tokenizer_of(configs, rows, MEDIA if configs.folder else None),
    }


def _part(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = config.get(key) or {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"idefics: {key}: found {type(part).__name__}, expected a mapping")
    return dict(part)


def _square(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The file of the family's own processor as one that stretches to a square; older files say ``image_size``."""
    if not preprocessor:
        return {}
    own = {key: value for key, value in preprocessor.items() if key not in ("image_processor_type", "image_size")}
    side = preprocessor.get("image_size", 224)
    return {"size": {"height": side, "width": side}, **own, "image_processor_type": "BlipImageProcessor"}


def _encoder(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "use": "vit",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["embed_dim"],
        "depth": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "mlp_dim": vision["intermediate_size"],
        "activation": activation(vision["hidden_act"]),
        "norm_eps": vision["layer_norm_eps"],
        "pool": "cls",
        "cls_feature": True,
        "embed_norm": True,
        "patch_bias": False,
        "norm_features": False,
    }


def _connector(resampler: Mapping[str, Any], width: int) -> dict[str, Any]:
    return {
        "use": "perceiver",
        "width": width,
        "latents": resampler["resampler_n_latents"],
        "depth": resampler["resampler_depth"],
        "heads": resampler["resampler_n_heads"],
        "head_dim": resampler["resampler_head_dim"],
        "qk_norm": resampler["qk_layer_norms_perceiver"],
        "activation": "relu",
        "project": False,
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``IdeficsForVisionText2Text``."""
    image, _, backbone, entry = _parts(model)
    gates = []
    for place, block in enumerate(range(0, backbone.transformer.depth, entry.every)):
        ours, hub = f"backbone.transformer.blocks.{block}.gated_cross.", f"model.gated_cross_attn_layers.{place}."
        shape = Reshape((-1,), (1, 1, -1)) if entry.gate == "tanh_channel" else Reshape((-1,), (-1,))
        gates += [Rule(f"{ours}{mine}.{{p}}", f"{hub}{theirs}.{{p}}") for mine, theirs in _GATED.items()]
        gates += [
            Rule(ours + "attention_gate", hub + "alpha_cross_attn", shape),
            Rule(ours + "mlp_gate", hub + "alpha_dense", shape),
        ]
    connector, resampler = "streams.image.connector.", "model.perceiver_resampler."
    rules = [
        *gates,
        Rule(connector + "latents", resampler + "latents"),
        Rule(connector + "final_norm.{p}", resampler + "layer_norm.{p}"),
        *block_rules(connector + "blocks", resampler + "blocks", _RESAMPLER),
        Rule("backbone.embed_added.weight", "model.embed_tokens.additional_embedding.weight"),
    ]
    head = [
        Rule("heads.text.proj.weight", "lm_head.weight"),
        Rule("heads.text.added.weight", "lm_head.additional_fc.weight"),
    ]
    is_tied = model.heads["text"].tied
    table = NameTable(
        [*rules, *([] if is_tied else head)],
        ignored=(
            "model.gated_cross_attn_layers.{i}.cross_attn.rotary_emb.inv_freq",
            *((rule.hub for rule in head) if is_tied else ()),
        ),
    )
    return (
        table + vision_names("streams.image.encoder.", "model.vision_model.", image) + llama_names(backbone, "model.")
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    image, connector, backbone, entry = _parts(model)
    rows = model.tokenizer.rows or vocabulary.size
    vision = {
        "model_type": "idefics_vision",
        "embed_dim": image.width,
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "intermediate_size": image.mlp_dim or 4 * image.width,
        "num_hidden_layers": image.depth,
        "num_attention_heads": image.heads,
        "hidden_act": hub_activation(image.activation),
        "layer_norm_eps": image.norm_eps,
    }
    stack = {
        key: value
        for key, value in llama_config(backbone, rows - backbone.added_rows).items()
        if key not in ("head_dim", "num_key_value_heads")
    }
    config = {
        "model_type": "idefics",
        "architectures": ["IdeficsForVisionText2Text"],
        **stack,
        "additional_vocab_size": backbone.added_rows,
        "cross_layer_interval": entry.every,
        "qk_layer_norms": entry.qk_norm,
        "alpha_type": "vector" if entry.gate == "tanh_channel" else "float",
        "use_resampler": connector is not None,
        "tie_word_embeddings": model.heads["text"].tied,
        "vision_config": vision,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    if connector is not None:
        config["perceiver_config"] = {
            "model_type": "idefics_perciever",
            "use_resampler": True,
            "resampler_n_latents": connector.latents,
            "resampler_depth": connector.depth,
            "resampler_n_heads": connector.heads,
            "resampler_head_dim": connector.head_dim or connector.width // connector.heads,
            "qk_layer_norms_perceiver": connector.qk_norm,
        }
    reader = model.streams["image"].reader
    assert isinstance(reader, ImageReaderConfig)
    processor = {
        **image_preprocessor(reader, "BlipImageProcessor"),
        "image_processor_type": "IdeficsImageProcessor",
        "image_size": reader.size_px,
        "processor_class": "IdeficsProcessor",
    }
    return {"config.json": config, "preprocessor_config.json": processor}


def _parts(model: ModelConfig) -> tuple[VitConfig, PerceiverConfig | None, DecoderConfig, CrossAttentionEntry]:
    """Image tower, resampler, decoder and entry of a model that Idefics can say."""
    stream = model.streams["image"] if list(model.streams) == ["image"] else None
    head = model.heads.get("text")
    if (
        stream is not None
        and isinstance(stream.encoder, VitConfig)
        and isinstance(stream.connector, PerceiverConfig | None)
        and isinstance(stream.enters, CrossAttentionEntry)
        and isinstance(model.backbone, DecoderConfig)
        and isinstance(head, NextTokenConfig)
    ):
        return stream.encoder, stream.connector, model.backbone, stream.enters
    raise ConfigError(
        "idefics: found a model of other parts, expected an image stream with the encoder 'vit' and the connector "
        "'perceiver' or none that a decoder looks at, and a head 'text' for the next token"
    )


_HUGE = {"embed_dim": 1280, "num_attention_heads": 16, "num_hidden_layers": 32, "intermediate_size": 5120}


def _size(parameters: int, **text: Any) -> Size:
    config = {
        "model_type": "idefics",
        "architectures": ["IdeficsForVisionText2Text"],
        "additional_vocab_size": 2,
        "use_resampler": True,
        "qk_layer_norms": True,
        "vision_config": _HUGE,
        "perceiver_config": {"qk_layer_norms_perceiver": True, "use_resampler": True},
        **text,
    }
    return Size(config, parameters)


IDEFICS = Architecture(
    "idefics",
    ("idefics",),
    "Flamingo, arXiv 2204.14198, sections 3.1 and 3.2, as Idefics (arXiv 2306.16527, section 5) lays it out",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # As published, rounded: 9B and 80B.
        "idefics-9b": _size(8_929_679_632, cross_layer_interval=4),
        "idefics-80b": _size(
            79_968_171_264,
            cross_layer_interval=4,
            alpha_type="vector",
            hidden_size=8192,
            intermediate_size=22_016,
            num_hidden_layers=80,
            num_attention_heads=64,
        ),
    },
)
"""See the module."""
