"""Image and text towers in the layout that CLIP and SigLIP checkpoints share, also inside larger models.

``vision_model.embeddings...``, ``vision_model.encoder.layers.{i}...``, ``text_model...``; the functions take the two
paths, so that a language model's vision tower is a call with other prefixes.
"""

from __future__ import annotations

from typing import Any

from polymodal.models.encoders.vit import VitConfig
from polymodal.models.presets.blocks import block_rules
from polymodal.models.weights import NameTable, Reshape, Rule, Slice

_PARTS = {
    "attention_norm": "layer_norm1",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def grid_fields(image_size: int, patch_size: int) -> dict[str, Any]:
    """The fields of our image encoder that say how a picture is cut; published models drop what is no whole patch."""
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        **({"drop_rest": True} if image_size % patch_size else {}),
    }


def vision_names(ours: str, hub: str, encoder: VitConfig) -> NameTable:
    """Names of an image tower.

    Args:
        ours: path of the encoder, ``streams.image.encoder.``.
        hub: path of the stored tower, ``vision_model.``.
        encoder: its config.
    """
    trunk, width = ours + "trunk.", encoder.width
    pool, stored = trunk + "attention_pool.", hub + "head."
    return NameTable(
        [
            Rule(trunk + "patch_embed.{p}", hub + "embeddings.patch_embedding.{p}"),
            Rule(trunk + "cls_token", hub + "embeddings.class_embedding"),
            Rule(trunk + "learned_positions.weight", hub + "embeddings.position_embedding.weight"),
            Rule(trunk + "embed_norm.{p}", hub + "pre_layrnorm.{p}"),
            Rule(trunk + "pooled_norm.{p}", hub + "post_layernorm.{p}"),
            Rule(trunk + "transformer.final_norm.{p}", hub + "post_layernorm.{p}"),
            *block_rules(trunk + "transformer.blocks", hub + "encoder.layers", _PARTS),
            Rule(pool + "query", stored + "probe", Reshape((width,), (1, 1, width))),
            *(
                Rule(f"{pool}attention.{part}.{kind}", f"{stored}attention.in_proj_{kind}", Slice(place, 3))
                for place, part in enumerate(("q_proj", "k_proj", "v_proj"))
                for kind in ("weight", "bias")
            ),
            Rule(pool + "attention.out_proj.{p}", stored + "attention.out_proj.{p}"),
            Rule(pool + "norm.{p}", stored + "layernorm.{p}"),
            Rule(pool + "mlp.up_proj.{p}", stored + "mlp.fc1.{p}"),
            Rule(pool + "mlp.down_proj.{p}", stored + "mlp.fc2.{p}"),
        ],
        ignored=(hub + "embeddings.position_ids",),
    )


def text_names(ours: str, hub: str) -> NameTable:
    """Names of a text tower; see :func:`vision_names`."""
    return NameTable(
        [
            Rule(ours + "token_embed.{p}", hub + "embeddings.token_embedding.{p}"),
            Rule(ours + "positions.weight", hub + "embeddings.position_embedding.weight"),
            Rule(ours + "transformer.final_norm.{p}", hub + "final_layer_norm.{p}"),
            *block_rules(ours + "transformer.blocks", hub + "encoder.layers", _PARTS),
            Rule(ours + "pooled_proj.{p}", hub + "head.{p}"),
        ],
        ignored=(hub + "embeddings.position_ids",),
    )
