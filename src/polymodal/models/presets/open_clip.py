"""Checkpoints of ``open_clip``: ``open_clip_config.json`` beside ``open_clip_model.safetensors``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.image import ImageReaderConfig, filling
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.text_transformer import TextTransformerConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.heads.table import ProjectionConfig
from polymodal.models.presets import eva
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.clip import from_log_scale, own_rows, text_reader
from polymodal.models.presets.image_reader import CLIP_MEAN, CLIP_STD
from polymodal.models.presets.towers import grid_fields
from polymodal.models.weights import TRANSPOSED, HubConfigs, NameTable, Rule, Slice

_PARTS = {
    "attention_norm": "ln_1",
    "attention.out_proj": "attn.out_proj",
    "mlp_norm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_LOG_SCALE = math.log(1 / 0.07)
_HEAD_WIDTH = 64
_VISION_KNOWN = {
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "no_ln_pre",
    "final_ln_after_pool", "norm_kwargs", "patch_dropout", "attentional_pool", "pool_type", "pos_embed_type",
}  # fmt: skip
_TEXT_KNOWN = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "ls_init_value", "no_causal_mask",
    "pool_type", "proj_bias", "proj_type", "norm_kwargs", "embed_cls", "hf_tokenizer_name", "tokenizer_kwargs",
}  # fmt: skip
"""Keys that the translation reads or proves; any other is an error, since each of them changes what is computed."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Image and text stream and the shared space."""
    model, preprocess = configs.config["model_cfg"], configs.config.get("preprocess_cfg", {})
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    vision, text = model["vision_cfg"], model["text_cfg"]
    is_eva = vision.get("timm_model_name") in eva.TIMM
    encoder = eva_encoder(vision, model["embed_dim"]) if is_eva else vision_encoder(vision)
    encoder.setdefault("activation", activation)
    texts = {**text_encoder(text), "activation": activation}
    reader = _image_reader(preprocess, encoder["image_size"])
    streams = {
        "image": {"modality": "image", "encoder": encoder, "reader": reader},
        "text": {"modality": "text", "encoder": texts, "reader": text_reader(configs, texts["max_tokens"])},
    }
    projection = {
        "use": "projection",
        "dim": model["embed_dim"],
        "identity": ("image",) if is_eva else (),
        "temperature": from_log_scale(model.get("init_logit_scale", _LOG_SCALE)),
        "bias": model.get("init_logit_bias"),
    }
    return {"streams": streams, "backbone": "none", "heads": {"projection": projection}, **own_rows(streams)}


def vision_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The image tower of a ``vision_cfg``, activation apart.

    Raises:
        ConfigError: if it is of a kind that is not read here.
    """
    _known(config, _VISION_KNOWN, "vision_cfg")
    require(config, "open_clip vision_cfg", attentional_pool=False, pool_type="tok", pos_embed_type="learnable")
    width = config.get("width", 768)
    return {
        "use": "vit",
        **grid_fields(config.get("image_size", 224), config.get("patch_size", 16)),
        "width": width,
        "depth": config.get("layers", 12),
        "heads": width // config.get("head_width", _HEAD_WIDTH),
        "mlp_dim": int(width * config.get("mlp_ratio", 4.0)),
        "norm_eps": config.get("norm_kwargs", {}).get("eps", 1e-5),
        "layer_scale": config.get("ls_init_value"),
        "pool": "cls",
        "embed_norm": not config.get("no_ln_pre", False),
        "patch_bias": False,
        "norm_features": not config.get("final_ln_after_pool", False),
    }


def eva_encoder(config: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """The image tower of EVA-CLIP, one of timm's, with a linear map of its own into the shared space.

    Raises:
        ConfigError: if it is put together in another way.
    """
    _known(config, {"image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj"}, "vision_cfg")
    require(config, "open_clip vision_cfg", timm_pool="token", timm_proj=None)
    name, args = config["timm_model_name"], {"global_pool": "token"}
    if "image_size" in config:
        args["img_size"] = config["image_size"]
    return {**eva.encoder(name, args), "pooled_proj": dim}


def text_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text tower of a ``text_cfg``, activation apart.

    Raises:
        ConfigError: if it is of a kind that is not read here.
    """
    _known(config, _TEXT_KNOWN, "text_cfg")
    require(config, "open_clip text_cfg", embed_cls=False, proj_bias=False, proj_type="linear", ls_init_value=None)
    require(config, "open_clip text_cfg", pool_type=("argmax", "last"))
    width = config.get("width", 512)
    return {
        "use": "text_transformer",
        "vocab_size": config.get("vocab_size", 49408),
        "max_tokens": config.get("context_length", 77),
        "width": width,
        "depth": config.get("layers", 12),
        "heads": config.get("heads", 8),
        "mlp_dim": int(width * config.get("mlp_ratio", 4.0)),
        "norm_eps": config.get("norm_kwargs", {}).get("eps", 1e-5),
        "causal": not config.get("no_causal_mask", False),
        "pool": "last" if config.get("pool_type") == "last" else "highest",
    }


def _known(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    strange = sorted(set(config) - set(known))
    if strange:
        raise ConfigError(f"open_clip {where}: found {strange[0]!r}, expected keys of {sorted(known)} alone")


_MODES = {"crop": "shortest", "stretch": "squash", "pad": "longest"}
"""How a picture meets the canvas -> the package's name of it."""


def _image_reader(config: Mapping[str, Any], size_px: int) -> dict[str, Any]:
    """The package's evaluation transform; the size is the tower's, whatever the config says.

    Source: ``image_transform`` and ``create_model`` of open_clip.
    """
    given = {key: value for key, value in config.items() if value is not None}
    require(given, "open_clip preprocess_cfg", mode="RGB", resize_mode=tuple(_MODES.values()))
    require(given, "open_clip preprocess_cfg", interpolation=("bicubic", "bilinear", "random"))
    mode, mean, std = given.get("resize_mode", "shortest"), given.get("mean", CLIP_MEAN), given.get("std", CLIP_STD)
    return {
        "use": "image",
        "size_px": size_px,
        "resize": next(fit for fit, name in _MODES.items() if name == mode),
        "rounding": "nearest",
        "fill": (given.get("fill_color", 0),) * 3 if mode == "longest" else "mean",
        # "random" is for training alone.
        "resample": "bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
        "mean": tuple(mean) if isinstance(mean, list | tuple) else (mean,) * 3,
        "std": tuple(std) if isinstance(std, list | tuple) else (std,) * 3,
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``open_clip.CLIP``; of ``CustomTextCLIP``, whose text tower has a prefix, where the file has it."""
    image = model.streams["image"].encoder
    is_eva = isinstance(image, VitConfig) and image.pooled_proj is not None
    text = "text." if is_eva or any(name.startswith("text.") for name in stored) else ""
    trunk, ours = "streams.image.encoder.trunk.", "streams.text.encoder."
    table = NameTable([])
    if is_eva:
        table = eva.tower_names("streams.image.encoder.", "visual.trunk.", image, is_fused=eva.is_fused(image))
    return table + NameTable(
        [
            Rule(trunk + "patch_embed.{p}", "visual.conv1.{p}"),
            Rule(trunk + "cls_token", "visual.class_embedding"),
            Rule(trunk + "learned_positions.weight", "visual.positional_embedding"),
            Rule(trunk + "embed_norm.{p}", "visual.ln_pre.{p}"),
            Rule(trunk + "pooled_norm.{p}", "visual.ln_post.{p}"),
            Rule(trunk + "transformer.final_norm.{p}", "visual.ln_post.{p}"),
            *_blocks(trunk + "transformer.blocks", "visual.transformer.resblocks"),
            Rule(ours + "token_embed.{p}", text + "token_embedding.{p}"),
            Rule(ours + "positions.weight", text + "positional_embedding"),
            Rule(ours + "transformer.final_norm.{p}", text + "ln_final.{p}"),
            *_blocks(ours + "transformer.blocks", text + "transformer.resblocks"),
            Rule("heads.projection.projs.image.weight", "visual.proj", TRANSPOSED),
            Rule("heads.projection.projs.text.weight", text + "text_projection", TRANSPOSED),
            Rule("heads.projection.log_scale", "logit_scale"),
            Rule("heads.projection.bias", "logit_bias"),
        ],
        ignored=(text + "attn_mask",),
    )


def _blocks(ours: str, hub: str) -> list[Rule]:
    return [
        *block_rules(ours, hub, _PARTS),
        *(
            Rule(f"{ours}.{{i}}.attention.{part}.{kind}", f"{hub}.{{i}}.attn.in_proj_{kind}", Slice(place, 3))
            for place, part in enumerate(("q_proj", "k_proj", "v_proj"))
            for kind in ("weight", "bias")
        ),
        Rule(f"{ours}.{{i}}.attention_scale", f"{hub}.{{i}}.ls_1.gamma"),
        Rule(f"{ours}.{{i}}.mlp_scale", f"{hub}.{{i}}.ls_2.gamma"),
    ]


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``open_clip_config.json``."""
    heads = list(model.heads.values())
    head = heads[0] if len(heads) == 1 else None
    image, text = (getattr(model.streams.get(name), "encoder", None) for name in ("image", "text"))
    if not (isinstance(image, VitConfig) and isinstance(text, TextTransformerConfig) and len(model.streams) == 2):
        raise ConfigError("open_clip: found a model of other parts, expected the streams image (vit) and text")
    if not isinstance(head, ProjectionConfig) or head.temperature is None:
        raise ConfigError("open_clip: found other heads, expected one projection head with a temperature")
    has_own = getattr(model.streams["text"].reader, "tokenizer", None) is not None
    config: dict[str, Any] = {
        "embed_dim": head.dim,
        "vision_cfg": _vision_config(image) if image.pooled_proj is None else _eva_config(image),
        "text_cfg": {**_text_config(text), "vocab_size": text.vocab_size if has_own else vocabulary.size},
        "quick_gelu": text.activation == "quick_gelu",
        "custom_text": image.pooled_proj is not None,
        "init_logit_scale": -math.log(head.temperature),
    }
    if head.bias is not None:
        config["init_logit_bias"] = head.bias
    reader = model.streams["image"].reader
    return {"open_clip_config.json": {"model_cfg": config, "preprocess_cfg": _preprocess_config(reader)}}


def _vision_config(encoder: VitConfig) -> dict[str, Any]:
    return {
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "width": encoder.width,
        "layers": encoder.depth,
        "head_width": encoder.width // encoder.heads,
        "mlp_ratio": (encoder.mlp_dim or 4 * encoder.width) / encoder.width,
        "ls_init_value": encoder.layer_scale,
        "no_ln_pre": not encoder.embed_norm,
        "final_ln_after_pool": not encoder.norm_features,
        "norm_kwargs": {"eps": encoder.norm_eps},
    }


def _eva_config(encoder: VitConfig) -> dict[str, Any]:
    name, args = eva.nearest(encoder)
    if set(args) - {"img_size"}:
        raise ConfigError(f"open_clip: found an image tower that differs from timm's {name} in {sorted(args)}")
    return {"image_size": encoder.image_size, "timm_model_name": name, "timm_pool": "token", "timm_proj": None}


def _text_config(encoder: TextTransformerConfig) -> dict[str, Any]:
    return {
        "context_length": encoder.max_tokens,
        "width": encoder.width,
        "heads": encoder.heads,
        "layers": encoder.depth,
        "mlp_ratio": (encoder.mlp_dim or 4 * encoder.width) / encoder.width,
        "no_causal_mask": not encoder.causal,
        "pool_type": "last" if encoder.pool == "last" else "argmax",
        "norm_kwargs": {"eps": encoder.norm_eps},
    }


def _preprocess_config(reader: Any) -> dict[str, Any]:
    if not isinstance(reader, ImageReaderConfig) or reader.resize not in _MODES:
        raise ConfigError(f"open_clip: found the reader {reader}, expected 'image' with resize stretch, crop or pad")
    if reader.resample not in ("bicubic", "bilinear"):
        raise ConfigError(f"open_clip: found resample {reader.resample!r}, expected 'bicubic' or 'bilinear'")
    colour = set(filling(reader.fill, reader.mean, reader.rescale)) if reader.resize == "pad" else {0}
    if len(colour) > 1:
        raise ConfigError(f"open_clip: found the fill {reader.fill}, expected a grey: one number for every channel")
    return {
        "size": reader.size_px,
        "mode": "RGB",
        "mean": list(reader.mean),
        "std": list(reader.std),
        "interpolation": reader.resample,
        "resize_mode": _MODES[reader.resize],
        "fill_color": colour.pop(),
    }


def _size(parameters: int, dim: int, vision: Mapping[str, Any], text: Mapping[str, Any], **more: Any) -> Size:
    config = {"embed_dim": dim, "vision_cfg": dict(vision), "text_cfg": dict(text), **more}
    return Size({"model_type": "open_clip", "model_cfg": config}, parameters)


_B32, _L14 = {"patch_size": 32}, {"width": 1024, "layers": 24, "patch_size": 14}
_H14 = {"width": 1280, "layers": 32, "head_width": 80, "patch_size": 14}
_G14 = {"width": 1408, "layers": 40, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14}
_BIG_G14 = {"width": 1664, "layers": 48, "head_width": 104, "mlp_ratio": 4.9231, "patch_size": 14}
_EVA = {"timm_pool": "token", "timm_proj": None}
_EVA01, _EVA02_B = (
    {"timm_model_name": name, **_EVA} for name in ("eva_giant_patch14_224", "eva02_base_patch16_clip_224")
)
_EVA02_L, _EVA02_L336 = (
    {"timm_model_name": f"eva02_large_patch14_clip_{size}", "image_size": size, **_EVA} for size in (224, 336)
)
_EVA02_E = {"timm_model_name": "eva02_enormous_patch14_clip_224", **_EVA}
_BIG_TEXT = {"width": 1280, "heads": 20, "layers": 32}
_L_TEXT, _H_TEXT = {"width": 768, "heads": 12}, {"width": 1024, "heads": 16, "layers": 24}

OPEN_CLIP = Architecture(
    "open_clip",
    ("open_clip",),
    "OpenCLIP, arXiv 2212.07143, section 3; layout of the package open_clip",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "open_clip-vit-b-32": _size(151_277_313, 512, _B32, {}),
        "open_clip-vit-b-32-quickgelu": _size(151_277_313, 512, _B32, {}, quick_gelu=True),
        "open_clip-vit-b-16": _size(149_620_737, 512, {}, {}),
        "open_clip-vit-l-14": _size(427_616_513, 768, _L14, _L_TEXT),
        "open_clip-vit-h-14": _size(986_109_441, 1024, _H14, _H_TEXT),
        "open_clip-vit-g-14": _size(1_366_678_273, 1024, _G14, _H_TEXT),
        "open_clip-vit-bigg-14": _size(2_539_567_105, 1280, _BIG_G14, _BIG_TEXT),
        "open_clip-eva01-g-14": _size(1_136_435_841, 1024, _EVA01, _L_TEXT, custom_text=True),
        "open_clip-eva01-g-14-plus": _size(1_366_621_569, 1024, _EVA01, _H_TEXT, custom_text=True),
        "open_clip-eva02-b-16": _size(149_691_137, 512, _EVA02_B, {}, custom_text=True),
        "open_clip-eva02-l-14": _size(427_755_457, 768, _EVA02_L, _L_TEXT, custom_text=True),
        "open_clip-eva02-e-14": _size(4_704_589_569, 1024, _EVA02_E, _H_TEXT, custom_text=True),
        "open_clip-eva02-e-14-plus": _size(5_044_889_089, 1024, _EVA02_E, _BIG_TEXT, custom_text=True),
        "open_clip-eva02-l-14-336": _size(428_083_137, 768, _EVA02_L336, _L_TEXT, custom_text=True),
    },
    config_file="open_clip_config.json",
    weights_file="open_clip_model.safetensors",
)
"""See the module."""
