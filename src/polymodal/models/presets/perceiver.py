"""Perceiver IO checkpoints (``model_type: perceiver``): masked bytes, and images read in three ways."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.image import ImageReaderConfig
from polymodal.modalities.reader import ReaderConfig
from polymodal.models.backbones.latent import LatentConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.encoders.pixels import PixelsConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.weights import HubConfigs, NameTable, Rule

_TEXT = "PerceiverForMaskedLM"
_IMAGES: dict[str, dict[str, Any]] = {
    "PerceiverForImageClassificationLearned": {
        "stem": "linear", "channels": 256, "positions": "learned", "position_width": 256,
    },
    "PerceiverForImageClassificationFourier": {
        "stem": "none", "positions": "fourier", "bands": 64, "resolution": 224,
    },
    "PerceiverForImageClassificationConvProcessing": {
        "stem": "conv", "channels": 64, "positions": "fourier", "bands": 64, "resolution": 56,
    },
}  # fmt: skip
"""How each class of the reference library reads an image; what is not here stands in no config."""
_BLOCK = {
    "attention_norm": "attention.self.layernorm1",
    "memory_norm": "attention.self.layernorm2",
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
    "mlp_norm": "layernorm",
    "mlp.up_proj": "mlp.dense1",
    "mlp.down_proj": "mlp.dense2",
}
_RESAMPLES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_QUERY_WIDTH, _QUERY_HEADS = 256, 8
"""Of the queries for bytes; they stand in no config."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """One stream that latents read, and the head that asks them.

    Raises:
        ConfigError: if the checkpoint is of a class that is not built.
    """
    config = configs.config
    require(config, "perceiver", cross_attention_shape_for_attention=("kv", "q"))
    kind = configs.classes[0] if configs.classes else ""
    head: dict[str, Any]
    if kind == _TEXT:
        name, stream = "text", _text(config)
        head = {"use": "query_token", "stream": "text", "qk_width": _QUERY_WIDTH, "heads": _QUERY_HEADS}
    elif kind in _IMAGES:
        name, stream = "image", _image(kind, config, configs.preprocessor)
        head = {"use": "class", "classes": class_names(config), "query_heads": 1}
    else:
        raise ConfigError(
            f"perceiver: found the class {kind or 'none'}, expected one of {[_TEXT, *_IMAGES]}; "
            "use the adapter, {use: transformers, from: ...}"
        )
    stream |= {"modality": name, "enters": {"use": "latent", "code": False}}
    width = PixelsConfig.parse(stream["encoder"]).width if name == "image" else config.get("d_model", 768)
    return {"streams": {name: stream}, "backbone": _backbone(config, width), "heads": {head["use"]: head}}


def _backbone(config: Mapping[str, Any], input_width: int) -> dict[str, Any]:
    return {
        "use": "latent",
        "latents": config.get("num_latents", 256),
        "width": config.get("d_latents", 1280),
        "input_width": input_width,
        "depth": config.get("num_self_attends_per_block", 26),
        "repeats": config.get("num_blocks", 1),
        "heads": config.get("num_self_attention_heads", 8),
        "cross_heads": config.get("num_cross_attention_heads", 8),
        "qk_width": config.get("qk_channels"),
        "v_width": config.get("v_channels"),
        "cross_width": {"kv": "tokens", "q": "latents"}[config.get("cross_attention_shape_for_attention", "kv")],
        "mlp_ratio": config.get("self_attention_widening_factor", 1),
        "cross_mlp_ratio": config.get("cross_attention_widening_factor", 1),
        "activation": activation(config.get("hidden_act", "gelu")),
        "cross_residual": config.get("use_query_residual", True),
    }


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "encoder": {
            "use": "embedding",
            "vocab_size": config.get("vocab_size", 262),
            "max_tokens": config.get("max_position_embeddings", 2048),
            "width": config.get("d_model", 768),
        },
        "reader": {"use": "text", "max_tokens": config.get("max_position_embeddings", 2048), "bytes": True},
    }


def _image(kind: str, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    size = preprocessor.get("size", {"height": 224, "width": 224})
    # The learned codes say how large an image is; the others take what the preprocessing makes.
    side = config.get("image_size", 56) if "Learned" in kind else size["height"]
    require(preprocessor, "perceiver", do_resize=True, do_rescale=True, do_normalize=True)
    crop = preprocessor.get("crop_size", 256)
    crop = crop["height"] if isinstance(crop, Mapping) else crop
    reader = {
        "use": "image",
        "size_px": side,
        "resize": "stretch",
        "resample": _RESAMPLES[preprocessor.get("resample", 3)],
        "centre_share": size["height"] / crop if preprocessor.get("do_center_crop", True) else None,
        "rescale": preprocessor.get("rescale_factor", 1 / 255),
        "mean": preprocessor.get("image_mean", (0.485, 0.456, 0.406)),
        "std": preprocessor.get("image_std", (0.229, 0.224, 0.225)),
    }
    return {"encoder": {"use": "pixels", "image_size": side, **_IMAGES[kind]}, "reader": reader}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of the classes that wrap ``PerceiverModel``."""
    is_text = "text" in model.streams
    ours = "streams.text.encoder." if is_text else "streams.image.encoder."
    inputs = [
        Rule("backbone.latents", "embeddings.latents"),
        *_block("backbone.read", "encoder.cross_attention"),
        *block_rules("backbone.blocks", "encoder.self_attends", _BLOCK),
    ]
    read = "input_preprocessor."
    if is_text:
        head, decoder = "heads.query_token.", "decoder."
        inputs += [
            Rule(ours + "token_embed.{p}", read + "embeddings.{p}"),
            Rule(ours + "positions.{p}", read + "position_embeddings.{p}"),
            Rule(head + "queries", decoder + "output_position_encodings.position_embeddings"),
        ]
    else:
        head, decoder = "heads.class.", "decoder.decoder."
        inputs += [
            Rule(ours + "stem.0.{p}", read + "convnet.conv.{p}"),
            Rule(ours + "stem.1.{p}", read + "convnet.batchnorm.{p}"),
            Rule(ours + "stem.{p}", read + "convnet_1x1.{p}"),
            Rule(ours + "learned", read + "position_embeddings.position_embeddings"),
            Rule(ours + "position_proj.{p}", read + "positions_projection.{p}"),
            Rule(head + "query", decoder + "output_position_encodings.position_embeddings"),
            Rule(head + "out.{p}", decoder + "final_layer.{p}"),
        ]
    inputs += _block(head + "look", decoder + "decoding_cross_attention")
    tied = [Rule("heads.query_token.bias", "embedding_decoder.bias")] if is_text else []
    return NameTable(inputs).below("perceiver.") + NameTable(tied)


def _block(ours: str, hub: str) -> list[Rule]:
    return [Rule(f"{ours}.{mine}.{{p}}", f"{hub}.{theirs}.{{p}}") for mine, theirs in _BLOCK.items()]


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, and ``preprocessor_config.json`` of an image model."""
    backbone, streams = model.backbone, list(model.streams.values())
    if not isinstance(backbone, LatentConfig) or len(streams) != 1 or len(model.heads) != 1:
        raise ConfigError(
            "perceiver: found a model of other parts, expected one stream, a latent backbone and one head"
        )
    config: dict[str, Any] = {
        "model_type": "perceiver",
        "num_latents": backbone.latents,
        "d_latents": backbone.width,
        "num_self_attends_per_block": backbone.depth,
        "num_blocks": backbone.repeats,
        "num_self_attention_heads": backbone.heads,
        "num_cross_attention_heads": backbone.cross_heads,
        "qk_channels": backbone.qk_width,
        "v_channels": backbone.v_width,
        "cross_attention_shape_for_attention": {"tokens": "kv", "latents": "q"}[backbone.cross_width],
        "self_attention_widening_factor": backbone.mlp_ratio,
        "cross_attention_widening_factor": backbone.cross_mlp_ratio,
        "hidden_act": hub_activation(backbone.activation),
        "use_query_residual": backbone.cross_residual,
    }
    encoder = streams[0].encoder
    if isinstance(encoder, EmbeddingConfig) and "query_token" in model.heads:
        config |= {"architectures": [_TEXT], "vocab_size": encoder.vocab_size, "d_model": encoder.width}
        return {"config.json": config | {"max_position_embeddings": encoder.max_tokens}}
    if not isinstance(encoder, PixelsConfig) or "class" not in model.heads:
        raise ConfigError("perceiver: expected 'embedding' and query_token, or 'pixels' and class")
    kind = next(
        (name for name, keys in _IMAGES.items() if all(getattr(encoder, key) == keys[key] for key in keys)), None
    )
    if kind is None:
        raise ConfigError(f"perceiver: no published class reads images by {encoder.to_data()}")
    config |= {"architectures": [kind], "image_size": encoder.image_size, **label_config(model.heads["class"].classes)}
    return {"config.json": config, "preprocessor_config.json": _preprocessor(streams[0].reader, encoder.image_size)}


def _preprocessor(reader: ReaderConfig | None, side: int) -> dict[str, Any]:
    assert isinstance(reader, ImageReaderConfig)
    square = {"height": side, "width": side}
    crop = side if reader.centre_share is None else round(side / reader.centre_share)
    return {
        "image_processor_type": "PerceiverImageProcessor",
        "do_center_crop": reader.centre_share is not None,
        "crop_size": {"height": crop, "width": crop},
        "do_resize": True,
        "size": square,
        "resample": next(number for number, name in _RESAMPLES.items() if name == reader.resample),
        "do_rescale": True,
        "rescale_factor": reader.rescale,
        "do_normalize": True,
        "image_mean": list(reader.mean),
        "image_std": list(reader.std),
    }


def _image_size(kind: str, parameters: int, d_model: int) -> Size:
    config = {
        "model_type": "perceiver", "architectures": [kind], "d_model": d_model, "num_latents": 512, "d_latents": 1024,
        "num_blocks": 8, "num_self_attends_per_block": 6, "num_cross_attention_heads": 1, "num_labels": 1000,
        "image_size": 224,
    }  # fmt: skip
    return Size(config, parameters)


_BYTES = {"model_type": "perceiver", "architectures": [_TEXT]}

PERCEIVER = Architecture(
    "perceiver",
    ("perceiver",),
    "Perceiver IO, arXiv 2107.14795, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # The paper: 201M for bytes; 62.3M, 48.4M for images with learned and fourier codes; the third by its config.
        "perceiver-language": Size({**_BYTES, "qk_channels": 256, "v_channels": 1280}, 201_108_230),
        "perceiver-vision-learned": _image_size("PerceiverForImageClassificationLearned", 62_255_848, 512),
        "perceiver-vision-fourier": _image_size("PerceiverForImageClassificationFourier", 48_440_627, 261),
        "perceiver-vision-conv": _image_size("PerceiverForImageClassificationConvProcessing", 48_646_522, 322),
    },
)
"""See the module."""
