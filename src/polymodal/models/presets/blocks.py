"""Name tables of blocks that many checkpoints share."""

from __future__ import annotations

from collections.abc import Mapping

from polymodal.models.weights import Rule


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
