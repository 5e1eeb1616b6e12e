"""ViLT checkpoints (``model_type: vilt``): words and patches in one encoder, with the head that the file has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.image.patches import PatchesReaderConfig
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.encoders.patches import PatchesConfig
from polymodal.models.heads.table import ClassConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import VIT_PARTS, block_rules
from polymodal.models.presets.clip import text_reader
from polymodal.models.presets.image_reader import resample_code, resample_name
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.presets.rows import Row, word_rows
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "type_vocab_size": 2,
    "max_position_embeddings": 40,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 384,
    "patch_size": 32,
    "qkv_bias": True,
}
_LONGEST = 1333 / 800
"""Longest edge to shortest in the published preprocessing."""
_CLASSES = {
    "ViltModel": None,
    "ViltForMaskedLM": "masked_token",
    "ViltForQuestionAnswering": "class",
    "ViltForImageAndTextRetrieval": "matching",
}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Text and image stream in an encoder backbone."""
    config = {**_DEFAULTS, **configs.config}
    require(config, "vilt", num_channels=3, modality_type_vocab_size=2, max_image_length=(-1, None), num_images=(-1, 1))
    require(config, "vilt", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    kind = next(iter(configs.classes), "ViltModel")
    if kind not in _CLASSES:
        raise ConfigError(f"vilt: found the class {kind!r}, expected one of {', '.join(_CLASSES)}")
    width, eps, patch = config["hidden_size"], config["layer_norm_eps"], config["patch_size"]
    if config["image_size"] % patch:
        raise ConfigError(f"vilt: found image_size {config['image_size']}, expected a multiple of patch_size {patch}")
    text = {
        "use": "embedding",
        "width": width,
        "vocab_size": config["vocab_size"],
        "max_tokens": config["max_position_embeddings"],
        "segments": config["type_vocab_size"],
        "norm": True,
        "norm_eps": eps,
    }
    image = {"use": "patches", "width": width, "patch_size": patch, "grid": config["image_size"] // patch, "cls": True}
    transformer = {
        "width": width,
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "activation": activation(config["hidden_act"]),
        "norm_eps": eps,
        "qkv_bias": config["qkv_bias"],
    }
    entry = {"connector": "identity", "enters": "sequence"}
    reader = text_reader(configs, config["max_position_embeddings"])
    model = {
        "streams": {
            "text": {"modality": "text", "encoder": text, "reader": reader, **entry},
            "image": {"modality": "image", "encoder": image, "reader": _reader(configs.preprocessor, patch), **entry},
        },
        "backbone": {"use": "encoder", "transformer": transformer, "cls": False, "pooler": True},
        "heads": _heads(kind, config),
    }
    return model if "tokenizer" in reader else {**model, "tokenizer": {"use": "bpe", "rows": config["vocab_size"]}}


def _heads(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    use = _CLASSES[kind]
    if use == "masked_token":
        options = {"activation": activation(config["hidden_act"]), "norm_eps": config["layer_norm_eps"]}
        return {"words": {"use": use, "stream": "text", **options}}
    if use == "class":
        return {"class": {"use": use, "classes": class_names(config), "hidden": 2 * config["hidden_size"]}}
    return {} if use is None else {"match": {"use": use}}


def _reader(preprocessor: Mapping[str, Any], patch: int) -> dict[str, Any]:
    given = {"size_divisor": 32, "resample": 3, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, **preprocessor}
    size = given.get("size") or 384
    shortest = size["shortest_edge"] if isinstance(size, Mapping) else size
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not given.get(key, True):
            raise ConfigError(f"vilt: preprocessor_config.json: found {key}: false, expected true")
    if preprocessor and given["size_divisor"] != patch:
        raise ConfigError(f"vilt: found size_divisor {given['size_divisor']}, expected the patch_size, {patch}")
    return {
        "use": "patches",
        "patch_size": patch,
        "shortest_px": shortest,
        "longest_px": int(_LONGEST * shortest),
        "resample": resample_name(given["resample"]),
        "rescale": given.get("rescale_factor", 1 / 255),
        "mean": tuple(given["image_mean"]),
        "std": tuple(given["image_std"]),
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``ViltModel``, below ``vilt.`` in the classes that wrap it."""
    text, image = _parts(model)
    width, patch = text.width, image.patch_size
    words, pixels, types = "streams.text.encoder.", "streams.image.encoder.", "backbone.token_types."
    table = NameTable(
        [
            Rule(words + "token_embed.{p}", "embeddings.text_embeddings.word_embeddings.{p}"),
            Rule(words + "positions.weight", "embeddings.text_embeddings.position_embeddings.weight"),
            Rule(words + "segments.{p}", "embeddings.text_embeddings.token_type_embeddings.{p}"),
            Rule(words + "norm.{p}", "embeddings.text_embeddings.LayerNorm.{p}"),
            Rule(pixels + "cls_token", "embeddings.cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(pixels + "positions.weight", "embeddings.position_embeddings", Reshape((-1, width), (1, -1, width))),
            Rule(
                pixels + "patch_embed.weight",
                "embeddings.patch_embeddings.projection.weight",
                Reshape((width, -1), (width, 3, patch, patch)),
            ),
            Rule(pixels + "patch_embed.bias", "embeddings.patch_embeddings.projection.bias"),
            Rule(types + "text", "embeddings.token_type_embeddings.weight", Row(0, 2)),
            Rule(types + "image", "embeddings.token_type_embeddings.weight", Row(1, 2)),
            Rule("backbone.pooler.{p}", "pooler.dense.{p}"),
            Rule("backbone.transformer.final_norm.{p}", "layernorm.{p}"),
            *block_rules("backbone.transformer.blocks", "encoder.layer", VIT_PARTS),
        ],
        ignored=("embeddings.text_embeddings.position_ids",),
    )
    is_wrapped = bool(model.heads) or any(name.startswith("vilt.") for name in stored)
    heads = [
        Rule("heads.words.dense.{p}", "mlm_score.transform.dense.{p}"),
        Rule("heads.words.norm.{p}", "mlm_score.transform.LayerNorm.{p}"),
        Rule("heads.words.proj.{p}", "mlm_score.decoder.{p}"),
        Rule("heads.class.{i}.{p}", "classifier.{i}.{p}"),
        Rule("heads.match.{p}", "rank_output.{p}"),
    ]
    # Older files hold the bias of the decoder twice.
    return (table.below("vilt.") if is_wrapped else table) + NameTable(heads, ignored=("mlm_score.bias",))


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    text, image = _parts(model)
    stack, reader = model.backbone.transformer, model.streams["image"].reader
    assert isinstance(reader, PatchesReaderConfig)
    heads = list(model.heads.values())
    kind = next(name for name, use in _CLASSES.items() if use == (heads[0].use if heads else None))
    config = {
        "model_type": "vilt",
        "architectures": [kind],
        "vocab_size": word_rows(model, vocabulary),
        "type_vocab_size": text.segments,
        "max_position_embeddings": text.max_tokens,
        "hidden_size": text.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.mlp_dim or 4 * stack.width,
        "hidden_act": hub_activation(stack.activation),
        "layer_norm_eps": stack.norm_eps,
        "image_size": image.grid * image.patch_size,
        "patch_size": image.patch_size,
        "qkv_bias": stack.qkv_bias is not False,
    }
    if heads and isinstance(heads[0], ClassConfig):
        config |= label_config(heads[0].classes)
    processor = {
        "image_processor_type": "ViltImageProcessor",
        "processor_class": "ViltProcessor",
        "size": {"shortest_edge": reader.shortest_px},
        "size_divisor": reader.patch_size,
        "resample": resample_code(reader.resample),
        "rescale_factor": reader.rescale,
        "image_mean": list(reader.mean),
        "image_std": list(reader.std),
    }
    return {"config.json": config, "preprocessor_config.json": processor}


def _parts(model: ModelConfig) -> tuple[EmbeddingConfig, PatchesConfig]:
    encoders = {name: stream.encoder for name, stream in model.streams.items()}
    text, image = encoders.get("text"), encoders.get("image")
    uses = {head.use for head in model.heads.values()}
    is_vilt = isinstance(model.backbone, EncoderBackboneConfig) and len(encoders) == 2 and len(model.heads) <= 1
    if not (is_vilt and isinstance(text, EmbeddingConfig) and isinstance(image, PatchesConfig) and uses <= _USES):
        raise ConfigError(
            "vilt: found a model of other parts, expected a text stream with the encoder 'embedding' and an image "
            f"stream with 'patches' in the backbone 'encoder', and at most one head of the kinds {sorted(_USES)}"
        )
    return text, image


_USES = {use for use in _CLASSES.values() if use is not None}


def _size(parameters: int, kind: str, **config: Any) -> Size:
    return Size({"model_type": "vilt", "architectures": [kind], **config}, parameters)


VILT = Architecture(
    "vilt",
    ("vilt",),
    "ViLT, arXiv 2102.03334, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "vilt-b32-mlm": _size(112_217_658, "ViltForMaskedLM"),
        "vilt-b32-finetuned-vqa": _size(117_588_537, "ViltForQuestionAnswering", num_labels=3129),
        "vilt-b32-finetuned-coco": _size(111_595_777, "ViltForImageAndTextRetrieval"),
    },
)
"""See the module. The paper (table 6) gives 87.4M for all but the word embeddings."""
