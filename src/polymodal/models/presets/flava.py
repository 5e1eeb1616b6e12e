"""FLAVA checkpoints (``model_type: flava``): an image, a text and a joint encoder, and the heads of its pretraining."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.dvae import DvaeConfig
from polymodal.models.encoders.text_transformer import TextTransformerConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.heads.table import ProjectionConfig
from polymodal.models.presets.activations import activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import VIT_PARTS, block_rules
from polymodal.models.presets.clip import from_log_scale, part_config, text_reader
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.rows import word_rows
from polymodal.models.presets.stacks import stack_config, stack_fields
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

_STACK: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
_IMAGE = {**_STACK, "image_size": 224, "patch_size": 16, "mask_token": True, "vocab_size": 8192}
_TEXT = {**_STACK, "vocab_size": 30522, "type_vocab_size": 2, "max_position_embeddings": 512}
_JOINT = {**_STACK, "num_hidden_layers": 6}
_CODEBOOK: dict[str, Any] = {"hidden_size": 256, "vocab_size": 8192, "num_blocks_per_group": 2}
_MODEL, _PRETRAINING = "FlavaModel", "FlavaForPreTraining"
_TOKEN_HEADS = {"mim": "mim_head", "mlm": "mlm_head", "mmm_image": "mmm_image_head", "mmm_text": "mmm_text_head"}
_POOLERS = {"image_pooler": "image_model", "text_pooler": "text_model", "joint_pooler": "multimodal_model"}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Image and text stream into an encoder backbone, in one space beside it; with the codebook for pretraining."""
    config = configs.config
    image = {**_IMAGE, **part_config(config, "image", "flava")}
    text = {**_TEXT, **part_config(config, "text", "flava")}
    joint = {**_JOINT, **part_config(config, "multimodal", "flava")}
    for part in (image, text, joint):
        require(part, "flava", qkv_bias=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    require(joint, "flava", use_cls_token=True)
    require(image, "flava", num_channels=3)
    kind = next(iter(configs.classes), _PRETRAINING)
    if kind not in (_MODEL, _PRETRAINING):
        raise ConfigError(f"flava: found the class {kind!r}, expected {_MODEL} or {_PRETRAINING}")
    vision = {
        "use": "vit",
        "image_size": image["image_size"],
        "patch_size": image["patch_size"],
        **stack_fields(image, "flava"),
        "pool": "cls",
        "cls_feature": True,
        "norm_features": False,
        "mask_token": image["mask_token"],
    }
    words = {
        "use": "text_transformer",
        "vocab_size": text["vocab_size"],
        "max_tokens": text["max_position_embeddings"],
        **stack_fields(text, "flava"),
        "segments": text["type_vocab_size"],
        "embed_norm": True,
        "pool": "first",
        "norm_features": False,
    }
    reader = text_reader(configs, text["max_position_embeddings"])
    pixels = image_reader(configs.preprocessor, image["image_size"], "FlavaImageProcessor")
    streams: dict[str, Any] = {
        "image": {"modality": "image", "encoder": vision, "reader": pixels, "enters": "sequence"},
        "text": {"modality": "text", "encoder": words, "reader": reader, "enters": "sequence"},
    }
    heads: dict[str, Any] = {
        "space": {
            "use": "projection",
            "dim": config.get("projection_dim", 768),
            "streams": ["image", "text"],
            "proj_bias": True,
            "temperature": from_log_scale(config.get("logit_scale_init_value", 2.6592)),
            "bias": None,
        },
        "image_pooler": {"use": "pooler", "stream": "image"},
        "text_pooler": {"use": "pooler", "stream": "text"},
        "joint_pooler": {"use": "pooler"},
    }
    if kind == _PRETRAINING:
        require(config, "flava", init_codebook=True)
        streams["codebook"] = _codec(part_config(config, "image_codebook", "flava"), image)
        heads |= _pretraining(text)
    backbone = {
        "use": "encoder",
        "order": ["image", "text"],
        "token_types": False,
        "transformer": stack_fields(joint, "flava"),
    }
    model = {"streams": streams, "backbone": backbone, "heads": heads}
    return model if "tokenizer" in reader else {**model, "tokenizer": {"use": "bpe", "rows": text["vocab_size"]}}


def _codec(given: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    config = {**_CODEBOOK, **given}
    require(config, "flava", num_groups=4, input_channels=3)
    if config["vocab_size"] != image["vocab_size"]:
        raise ConfigError(
            f"flava: found {config['vocab_size']} codes and image heads for {image['vocab_size']}, "
            "expected equal numbers"
        )
    side = 8 * (image["image_size"] // image["patch_size"])
    encoder = {
        "use": "dvae",
        "width": config["vocab_size"],
        "base": config["hidden_size"],
        "blocks": config["num_blocks_per_group"],
        "image_size": side,
    }
    return {"modality": "image", "encoder": encoder}


def _pretraining(text: Mapping[str, Any]) -> dict[str, Any]:
    options = {
        "use": "masked_token",
        "activation": activation(text["hidden_act"]),
        "norm_eps": text["layer_norm_eps"],
        "tied": False,
    }
    image = {**options, "stream": "image", "predicts": "codes", "codec": "codebook"}
    return {
        "mim": {**image, "at": "encoder"},
        "mlm": {**options, "stream": "text", "at": "encoder"},
        "mmm_image": image,
        "mmm_text": {**options, "stream": "text"},
        "match": {"use": "matching", "outputs": 2, "pooler": True},
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``FlavaModel``, below ``flava.`` in ``FlavaForPreTraining``."""
    width = _parts(model)[0].width
    vision, words, joint = "streams.image.encoder.trunk.", "streams.text.encoder.", "backbone."
    hub = "image_model.embeddings."
    table = NameTable(
        [
            Rule(vision + "patch_embed.{p}", hub + "patch_embeddings.projection.{p}"),
            Rule(vision + "cls_token", hub + "cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(vision + "mask_token", hub + "mask_token", Reshape((-1,), (1, 1, -1))),
            Rule(
                vision + "learned_positions.weight",
                hub + "position_embeddings",
                Reshape((-1, width), (1, -1, width)),
            ),
            Rule(vision + "pooled_norm.{p}", "image_model.layernorm.{p}"),
            *block_rules(vision + "transformer.blocks", "image_model.encoder.layer", VIT_PARTS),
            Rule(words + "token_embed.{p}", "text_model.embeddings.word_embeddings.{p}"),
            Rule(words + "positions.weight", "text_model.embeddings.position_embeddings.weight"),
            Rule(words + "segments.{p}", "text_model.embeddings.token_type_embeddings.{p}"),
            Rule(words + "embed_norm.{p}", "text_model.embeddings.LayerNorm.{p}"),
            Rule(words + "pooled_norm.{p}", "text_model.layernorm.{p}"),
            *block_rules(words + "transformer.blocks", "text_model.encoder.layer", VIT_PARTS),
            Rule("streams.image.connector.stack.layers.0.{p}", "image_to_mm_projection.{p}"),
            Rule("streams.text.connector.stack.layers.0.{p}", "text_to_mm_projection.{p}"),
            Rule(joint + "cls_token", "multimodal_model.cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(joint + "transformer.final_norm.{p}", "multimodal_model.layernorm.{p}"),
            *block_rules(joint + "transformer.blocks", "multimodal_model.encoder.layer", VIT_PARTS),
            *(Rule(f"heads.{name}.proj.{{p}}", f"{tower}.pooler.dense.{{p}}") for name, tower in _POOLERS.items()),
            Rule("heads.space.projs.image.{p}", "image_projection.{p}"),
            Rule("heads.space.projs.text.{p}", "text_projection.{p}"),
            Rule("heads.space.log_scale", "logit_scale"),
        ],
        ignored=("text_model.embeddings.position_ids",),
    )
    return table.below("flava.") + _pretraining_names() if "codebook" in model.streams else table


def _pretraining_names() -> NameTable:
    codec, blocks = "streams.codebook.encoder.", "image_codebook.blocks."
    rules = [
        Rule(codec + "stem.{p}", blocks + "input.{p}"),
        Rule(codec + "out.{p}", blocks + "output.conv.{p}"),
        Rule("heads.match.pooler.{p}", "itm_head.pooler.dense.{p}"),
        Rule("heads.match.proj.{p}", "itm_head.seq_relationship.{p}"),
    ]
    for ours, hub in _TOKEN_HEADS.items():
        rules += [
            Rule(f"heads.{ours}.dense.{{p}}", f"{hub}.transform.dense.{{p}}"),
            Rule(f"heads.{ours}.norm.{{p}}", f"{hub}.transform.LayerNorm.{{p}}"),
            Rule(f"heads.{ours}.proj.{{p}}", f"{hub}.decoder.{{p}}"),
        ]
    # The stored layout counts groups, blocks and convolutions from 1.
    for group in range(4):
        for block in range(_MOST_BLOCKS):
            ours, hub = f"{codec}groups.{group}.{block}.", f"{blocks}group_{group + 1}.group.block_{block + 1}."
            rules.append(Rule(ours + "id_path.{p}", hub + "id_path.{p}"))
            rules += [Rule(f"{ours}convs.{i}.{{p}}", f"{hub}res_path.path.conv_{i + 1}.{{p}}") for i in range(4)]
    # The bias of a decoder is stored under two names in older files.
    return NameTable(rules, ignored=tuple(f"{hub}.bias" for hub in _TOKEN_HEADS.values()))


_MOST_BLOCKS = 8
"""Blocks of a group that have names here; the published codebook has two."""


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    image, text = _parts(model)
    space = next(head for head in model.heads.values() if isinstance(head, ProjectionConfig))
    image_config = {
        "model_type": "flava_image_model",
        **stack_config(image),
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "mask_token": image.mask_token,
    }
    text_config = {
        "model_type": "flava_text_model",
        **stack_config(text),
        "vocab_size": word_rows(model, vocabulary),
        "type_vocab_size": text.segments,
        "max_position_embeddings": text.max_tokens,
    }
    joint = {"model_type": "flava_multimodal_model", **stack_config(model.backbone.transformer)}
    config: dict[str, Any] = {
        "model_type": "flava",
        "architectures": [_MODEL],
        "hidden_size": model.backbone.transformer.width,
        "projection_dim": space.dim,
        "text_config": text_config,
        "image_config": image_config,
        "multimodal_config": joint,
        "init_codebook": False,
    }
    if space.temperature is not None:
        config["logit_scale_init_value"] = -math.log(space.temperature)
    if "codebook" in model.streams:
        codec = model.streams["codebook"].encoder
        assert isinstance(codec, DvaeConfig)
        image_config["vocab_size"] = codec.width
        codebook = {"vocab_size": codec.width, "hidden_size": codec.base, "num_blocks_per_group": codec.blocks}
        config |= {"architectures": [_PRETRAINING], "init_codebook": True, "image_codebook_config": codebook}
    processor = image_preprocessor(model.streams["image"].reader, "FlavaImageProcessor")
    return {"config.json": config, "preprocessor_config.json": {**processor, "processor_class": "FlavaProcessor"}}


def _parts(model: ModelConfig) -> tuple[VitConfig, TextTransformerConfig]:
    encoders = {name: stream.encoder for name, stream in model.streams.items()}
    image, text = encoders.get("image"), encoders.get("text")
    fits = isinstance(model.backbone, EncoderBackboneConfig) and set(encoders) <= {"image", "text", "codebook"}
    heads = {"space", *_POOLERS} | ({*_TOKEN_HEADS, "match"} if "codebook" in encoders else set())
    if not (
        fits and isinstance(image, VitConfig) and isinstance(text, TextTransformerConfig) and heads == set(model.heads)
    ):
        raise ConfigError(
            "flava: found a model of other parts, expected an image stream with the encoder 'vit' and a text stream "
            f"with 'text_transformer' in the backbone 'encoder', and the heads {sorted(heads)}"
        )
    return image, text


FLAVA = Architecture(
    "flava",
    ("flava",),
    "FLAVA, arXiv 2112.04482, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "flava-full": Size({"model_type": "flava", "architectures": [_PRETRAINING]}, 357_645_303),
        "flava-full-encoders": Size({"model_type": "flava", "architectures": [_MODEL]}, 241_356_289),
    },
)
"""See the module."""
