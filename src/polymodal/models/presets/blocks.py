"""Name tables of blocks that many checkpoints share."""

from __future__ import annotations

from collections.abc import Mapping

from polymodal.models.weights import Rule

VIT_PARTS = {
    "attention_norm": "layernorm_before",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.out_proj": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
}
"""Part of our block -> stored part, in the layout of ViT's checkpoints."""


def block_rules(ours: str, hub: str, parts: Mapping[str, str]) -> list[Rule]:
    """Rules for every part of a numbered block, weight and bias alike.

    Worked example: ``block_rules("blocks", "encoder.layer", {"mlp.up_proj": "intermediate.dense"})`` gives
    ``blocks.{i}.mlp.up_proj.{p}`` <-> ``encoder.layer.{i}.intermediate.dense.{p}``.

    Args:
        ours: path of our list of blocks.
        hub: path of the stored one.
        parts: our part of a block -> the stored one.
    """
    return [Rule(f"{ours}.{{i}}.{mine}.{{p}}", f"{hub}.{{i}}.{stored}.{{p}}") for mine, stored in parts.items()]
