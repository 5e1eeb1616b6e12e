"""Losses over all pairs of a batch, a chunk of rows at a time.

Shape legend: ``B`` pairs, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polymodal.objectives.pairing import Relation


def mean_over_rows(loss: Callable[..., Tensor], x_BD: Tensor, relation: Relation, chunk: int, *others: Any) -> Tensor:
    """The mean over rows of a loss whose matrix of pairs is never held whole, a scalar.

    Args:
        loss: called as ``loss(x_CD, (relation, start, end), *others)`` for the rows ``start .. end``; their sum. It is
            computed again in the backward pass, and draws nothing at random.
        x_BD: the rows.
        relation: of all pairs.
        chunk: rows at a time.
        others: what else the loss reads, partners of all rows among it.
    """
    total = torch.zeros((), device=x_BD.device)
    for start in range(0, len(x_BD), chunk):
        end = min(start + chunk, len(x_BD))
        part: Tensor = checkpoint(
            loss, x_BD[start:end], (relation, start, end), *others, use_reentrant=False, preserve_rng_state=False
        )
        total = total + part
    return total / len(x_BD)
