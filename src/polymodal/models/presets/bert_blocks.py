"""Blocks in the layout of BERT's checkpoints, with cross-attention where there is some."""

from __future__ import annotations

_ATTENTION = {
    "q_proj": "self.query",
    "k_proj": "self.key",
    "v_proj": "self.value",
    "out_proj": "output.dense",
}
POST_NORM_PARTS = {
    **{f"attention.{ours}": f"attention.{hub}" for ours, hub in _ATTENTION.items()},
    "attention_norm": "attention.output.LayerNorm",
    **{f"cross_attention.{ours}": f"crossattention.{hub}" for ours, hub in _ATTENTION.items()},
    "cross_norm": "crossattention.output.LayerNorm",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
"""Part of our block -> stored part, for :func:`~polymodal.models.presets.blocks.block_rules`."""
