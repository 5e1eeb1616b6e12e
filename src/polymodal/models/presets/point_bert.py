"""Point-BERT trunks (``model_type: point_bert``).

No library publishes configs for them: this is the format that we read and write, with the tensor names of the
published code.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.point_groups import PointGroupsConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule, Slice

_FIELDS = {
    "trans_dim": ("width", 384),
    "depth": ("depth", 12),
    "num_heads": ("heads", 6),
    "num_group": ("num_groups", 64),
    "group_size": ("group_size", 32),
    "num_points": ("num_points", 1024),
}
"""Keys of the published configs, ours, and the published values."""
_PARTS = {
    "attention_norm": "norm1",
    "attention.out_proj": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """A points stream without a backbone; a linear ``class`` head on class token and maximum where there are labels.

    The published classifier has one hidden layer more (0.1M parameters).
    """
    config = configs.config
    encoder = {
        "use": "point_groups",
        **{ours: config.get(theirs, value) for theirs, (ours, value) in _FIELDS.items()},
        "colour": False,
        "embedding": "published",
        "centre_hidden": 128,
        "centres": "every_block",
        "qkv_bias": False,
        "pool": "cls_max",
    }
    heads = {}
    if config.get("id2label") or config.get("num_labels"):
        heads["class"] = {"use": "class", "stream": "points", "classes": class_names(config)}
    return {"streams": {"points": {"modality": "points", "encoder": encoder}}, "backbone": "none", "heads": heads}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of the published ``PointTransformer``."""
    ours = "streams.points.encoder."
    maps = [
        rule
        for mine, theirs in (("first", "encoder.first_conv"), ("second", "encoder.second_conv"))
        for place, shape in ((0, 3 if mine == "first" else 512), (3, 128 if mine == "first" else 512))
        for rule in (
            # Their maps are convolutions of one tap.
            Rule(
                f"{ours}group.{mine}.{place}.weight",
                f"{theirs}.{place}.weight",
                Reshape((-1, shape), (-1, shape, 1)),
            ),
            Rule(f"{ours}group.{mine}.{place}.bias", f"{theirs}.{place}.bias"),
        )
    ]
    blocks = ours + "transformer.blocks"
    return NameTable(
        [
            *maps,
            Rule(ours + "group.first.1.{p}", "encoder.first_conv.1.{p}"),
            Rule(ours + "group.second.1.{p}", "encoder.second_conv.1.{p}"),
            Rule(ours + "group.reduce.{p}", "reduce_dim.{p}"),
            Rule(ours + "cls_token", "cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(ours + "cls_code", "cls_pos", Reshape((-1,), (1, 1, -1))),
            Rule(ours + "centre_proj.{rest}", "pos_embed.{rest}"),
            *block_rules(blocks, "blocks.blocks", _PARTS),
            *(
                Rule(
                    f"{blocks}.{{i}}.attention.{part}_proj.weight", "blocks.blocks.{i}.attn.qkv.weight", Slice(index, 3)
                )
                for index, part in enumerate("qkv")
            ),
            Rule(ours + "transformer.final_norm.{p}", "norm.{p}"),
            Rule("heads.class.{p}", "classifier.{p}"),
        ],
        ignored=("cls_head_finetune.{rest}", "lm_head.{rest}", "mask_token"),
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``."""
    encoder = model.streams["points"].encoder if list(model.streams) == ["points"] else None
    if not isinstance(encoder, PointGroupsConfig) or {head.use for head in model.heads.values()} - {"class"}:
        raise ConfigError(
            "point_bert: found a model of other parts, expected one points stream with the encoder 'point_groups'"
        )
    config: dict[str, Any] = {"model_type": "point_bert"}
    config |= {theirs: getattr(encoder, ours) for theirs, (ours, _) in _FIELDS.items()}
    for head in model.heads.values():
        config |= label_config(head.classes)
    return {"config.json": config}


POINT_BERT = Architecture(
    "point_bert",
    ("point_bert",),
    "Point-BERT, arXiv 2111.14819, section 3.1",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # Published: 22.1M with the classifier of two layers.
        "point-bert-modelnet40": Size({"model_type": "point_bert", "num_labels": 40}, 21_889_576),
    },
)
"""See the module."""
