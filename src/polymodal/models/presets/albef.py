"""ALBEF (``model_type: albef``): an image encoder, six layers of BERT for the text, six more that look at the image.

No library publishes configs for it: this is the format that we read and write, with the tensor names of the published
code; its momentum twin and queues are a training's state and not part of the model. ``task: retrieval`` is the class
that the code fine-tunes for retrieval (``flickr30k.pth``, ``mscoco.pth``, images of 384 pixels): the text encoder
stands one name higher, and nothing predicts masked words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.text_transformer import TextTransformerConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.bert_blocks import POST_NORM_PARTS
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.clip import text_reader
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.rows import Temperature, word_rows
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule, Slice

_DEFAULTS: dict[str, Any] = {
    "image_size": 256,
    "patch_size": 16,
    "vision_width": 768,
    "vision_layers": 12,
    "vision_heads": 12,
    "text_width": 768,
    "text_layers": 6,
    "joint_layers": 6,
    "text_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "max_tokens": 30,
    "embed_dim": 256,
    "task": "pretraining",
}
_HEADS = {"pretraining": ("space", "match", "words"), "retrieval": ("space", "match")}
"""What each of the published classes computes."""
_VISION_PARTS = {
    "attention_norm": "norm1",
    "attention.out_proj": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
_TEXT_EPS, _VISION_EPS = 1e-12, 1e-6


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Image and text in one space; the text's upper layers look at the image; matching and masked words."""
    given = {**_DEFAULTS, **configs.config}
    require(given, "albef", task=tuple(_HEADS))
    image = {
        "use": "vit",
        "image_size": given["image_size"],
        "patch_size": given["patch_size"],
        "width": given["vision_width"],
        "depth": given["vision_layers"],
        "heads": given["vision_heads"],
        "norm_eps": _VISION_EPS,
        "pool": "cls",
        "cls_feature": True,
    }
    text = {
        "use": "text_transformer",
        "vocab_size": given["vocab_size"],
        "max_tokens": given["max_position_embeddings"],
        "width": given["text_width"],
        "depth": given["text_layers"],
        "heads": given["text_heads"],
        "norm_eps": _TEXT_EPS,
        "pre_norm": False,
        "embed_norm": True,
        "segments": 2,
        "pool": "first",
    }
    joint = {
        "width": given["text_width"],
        "depth": given["joint_layers"],
        "heads": given["text_heads"],
        "norm_eps": _TEXT_EPS,
        "pre_norm": False,
        "final_norm": False,
    }
    pixels = image_reader(configs.preprocessor, given["image_size"], "BlipImageProcessor")
    reader = text_reader(configs, given["max_tokens"])
    model: dict[str, Any] = {
        "streams": {
            "image": {"modality": "image", "encoder": image, "reader": pixels, "enters": "cross_attention"},
            "text": {
                "modality": "text", "encoder": text, "reader": reader, "connector": "identity", "enters": "sequence",
            },
        },
        "backbone": {"use": "encoder", "cls": False, "token_types": False, "transformer": joint},
        "heads": {
            "space": {
                "use": "projection",
                "dim": given["embed_dim"],
                "streams": ["image", "text"],
                "proj_bias": True,
                "temperature": 0.07,
                "bias": None,
            },
            "match": {"use": "matching", "outputs": 2},
            "words": {"use": "masked_token"},
        },
    }  # fmt: skip
    heads = {name: head for name, head in model["heads"].items() if name in _HEADS[given["task"]]}
    model = {**model, "heads": heads}
    return model if "tokenizer" in reader else {**model, "tokenizer": {"use": "bpe", "rows": given["vocab_size"]}}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of the published code."""
    image, text = _parts(model)
    trunk, words = "streams.image.encoder.trunk.", "streams.text.encoder."
    bert = "text_encoder.bert." if "words" in model.heads else "text_encoder."
    width, layers = image.width, bert + "encoder.layer"
    fused = [
        Rule(
            f"{trunk}transformer.blocks.{{i}}.attention.{part}.{{p}}",
            "visual_encoder.blocks.{i}.attn.qkv.{p}",
            Slice(n, 3),
        )
        for n, part in enumerate(("q_proj", "k_proj", "v_proj"))
    ]
    joint = [
        Rule(f"backbone.transformer.blocks.{i}.{ours}.{{p}}", f"{layers}.{i + text.depth}.{hub}.{{p}}")
        for i in range(model.backbone.transformer.depth)
        for ours, hub in POST_NORM_PARTS.items()
    ]
    return NameTable(
        [
            Rule(trunk + "patch_embed.{p}", "visual_encoder.patch_embed.proj.{p}"),
            Rule(trunk + "cls_token", "visual_encoder.cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(trunk + "learned_positions.weight", "visual_encoder.pos_embed", Reshape((-1, width), (1, -1, width))),
            Rule(trunk + "transformer.final_norm.{p}", "visual_encoder.norm.{p}"),
            *fused,
            *block_rules(trunk + "transformer.blocks", "visual_encoder.blocks", _VISION_PARTS),
            Rule(words + "token_embed.{p}", bert + "embeddings.word_embeddings.{p}"),
            Rule(words + "positions.weight", bert + "embeddings.position_embeddings.weight"),
            Rule(words + "segments.{p}", bert + "embeddings.token_type_embeddings.{p}"),
            Rule(words + "embed_norm.{p}", bert + "embeddings.LayerNorm.{p}"),
            *block_rules(words + "transformer.blocks", layers, POST_NORM_PARTS),
            *joint,
            Rule("heads.space.projs.image.{p}", "vision_proj.{p}"),
            Rule("heads.space.projs.text.{p}", "text_proj.{p}"),
            Rule("heads.space.log_scale", "temp", Temperature()),
            Rule("heads.match.proj.{p}", "itm_head.{p}"),
            Rule("heads.words.dense.{p}", "text_encoder.cls.predictions.transform.dense.{p}"),
            Rule("heads.words.norm.{p}", "text_encoder.cls.predictions.transform.LayerNorm.{p}"),
            Rule("heads.words.proj.{p}", "text_encoder.cls.predictions.decoder.{p}"),
        ],
        ignored=(
            *("{q}_m.{rest}", "image_queue", "text_queue", "idx_queue", "queue_ptr"),
            "text_encoder.cls.predictions.bias",
            bert + "embeddings.position_ids",
        ),
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    image, text = _parts(model)
    config = {
        "model_type": "albef",
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "vision_width": image.width,
        "vision_layers": image.depth,
        "vision_heads": image.heads,
        "text_width": text.width,
        "text_layers": text.depth,
        "joint_layers": model.backbone.transformer.depth,
        "text_heads": text.heads,
        "vocab_size": word_rows(model, vocabulary),
        "max_position_embeddings": text.max_tokens,
        "max_tokens": getattr(model.streams["text"].reader, "max_tokens", _DEFAULTS["max_tokens"]),
        "embed_dim": model.heads["space"].dim,
        "task": next(task for task, heads in _HEADS.items() if set(heads) == set(model.heads)),
    }
    processor = image_preprocessor(model.streams["image"].reader, "BlipImageProcessor")
    return {"config.json": config, "preprocessor_config.json": processor}


def _parts(model: ModelConfig) -> tuple[VitConfig, TextTransformerConfig]:
    encoders: Mapping[str, Any] = {name: stream.encoder for name, stream in model.streams.items()}
    image, text = encoders.get("image"), encoders.get("text")
    fits = isinstance(model.backbone, EncoderBackboneConfig) and set(model.heads) in map(set, _HEADS.values())
    if not (fits and len(encoders) == 2 and isinstance(image, VitConfig) and isinstance(text, TextTransformerConfig)):
        raise ConfigError(
            "albef: found a model of other parts, expected an image stream with the encoder 'vit' that the backbone "
            "'encoder' looks at, a text stream with 'text_transformer', and the heads 'space', 'match' "
            "and, but for retrieval, 'words'"
        )
    return image, text


ALBEF = Architecture(
    "albef",
    ("albef",),
    "ALBEF, arXiv 2107.07651, section 3.1",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    # The paper (section 3.5) gives 85.8M for the image encoder and 123.7M for text and joint layers: 210M with heads.
    sizes={"albef-base": Size({"model_type": "albef"}, 209_937_725)},
)
"""See the module."""
