"""The pairwise sigmoid loss of SigLIP, a chunk of rows at a time.

Shape legend: ``B`` pairs, ``C`` rows of a chunk, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from polymodal.core.batch import Outputs
from polymodal.objectives.chunks import mean_over_rows
from polymodal.objectives.pairing import Pair, PairObjective, Relation
from polymodal.objectives.report import required, wide


class SigmoidPairs(PairObjective):
    """Every pair of the batch is a yes-or-no question; scale and bias come from the projection head.

    Source: SigLIP, arXiv 2303.15343, algorithm 1.
    """

    use: Literal["sigmoid_pairs"] = "sigmoid_pairs"
    min_rows: ClassVar[int] = 1

    def pair_loss(self, pair: Pair, relation: Relation, outputs: Outputs) -> Tensor:
        """The loss of one pair of streams, in nats."""
        scale = required(outputs.scale, self.use, "scale", "a projection head")
        bias = required(outputs.bias, self.use, "bias", "a projection head with a bias")
        return sigmoid_pairs(pair.x_BD, pair.y_BD, scale, bias, relation, self.chunk)


def sigmoid_pairs(
    x_BD: Tensor, y_BD: Tensor, scale: Tensor, bias: Tensor, relation: Relation, chunk: int = 1024
) -> Tensor:
    """Sum of the binary cross-entropies over all pairs, divided by ``B``; a scalar in nats.

    Args:
        x_BD: unit vectors.
        y_BD: their partners, row by row.
        scale: scalar, the inverse temperature.
        bias: scalar, added to every scaled similarity.
        relation: which rows are positives and negatives of each other; skipped pairs ask nothing.
        chunk: rows at a time; a chunk's matrix is made again in the backward pass.
    """
    return mean_over_rows(_chunk_loss, x_BD, relation, chunk, y_BD, scale, bias)


def _chunk_loss(x_CD: Tensor, rows: tuple[Relation, int, int], y_BD: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    relation, start, end = rows
    is_positive_CB, is_negative_CB = relation.chunk(start, end)
    with torch.autocast(x_CD.device.type, enabled=False):
        logits_CB = wide(scale) * (wide(x_CD) @ wide(y_BD).T) + wide(bias)
    losses_CB = F.softplus(torch.where(is_positive_CB, -logits_CB, logits_CB))
    return (losses_CB * (is_positive_CB | is_negative_CB)).sum()
