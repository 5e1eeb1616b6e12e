"""Means over neighbouring tokens, and over the units of an item.

Shape legend: ``M`` tokens, ``D`` width, ``U`` units, ``I`` items.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_neighbours(media_MD: Tensor, pools: list[tuple[int, int]]) -> Tensor:
    """Means of neighbouring tokens of each item; the last mean of an item is over what is left.

    Args:
        media_MD: the tokens of all items, one after another.
        pools: per item, its tokens and how many neighbours become one; empty for no pooling.
    """
    if not pools or sum(tokens for tokens, _ in pools) != len(media_MD):
        # A wrong number is the caller's to name.
        return media_MD
    parts = []
    for item_MD, (_, pool) in zip(torch.split(media_MD, [tokens for tokens, _ in pools]), pools, strict=True):
        whole = len(item_MD) - len(item_MD) % pool
        parts.append(item_MD[:whole].view(-1, pool, item_MD.shape[1]).mean(dim=1))
        if whole < len(item_MD):
            parts.append(item_MD[whole:].mean(dim=0, keepdim=True))
    return torch.cat(parts)


def pool_items(pooled_UD: Tensor, unit_counts: list[int]) -> Tensor:
    """Mean over each item's units: ``[I, D]``."""
    if all(count == 1 for count in unit_counts):
        return pooled_UD
    return torch.stack([part.mean(0) for part in torch.split(pooled_UD, unit_counts)])
