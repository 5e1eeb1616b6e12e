"""The triplet loss with in-batch negatives, a chunk of anchors at a time.

Shape legend: ``B`` pairs, ``C`` anchors of a chunk, ``D`` width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from polymodal.core.batch import Outputs
from polymodal.objectives.chunks import mean_over_rows
from polymodal.objectives.pairing import Pair, PairObjective, Relation
from polymodal.objectives.report import wide

Negatives = Literal["hardest", "all"]


class Triplet(PairObjective):
    """A partner must be nearer than every negative by a margin, in both directions.

    Args:
        margin: in cosine distance (0 to 2).
        negatives: ``hardest``: the nearest negative of each anchor; ``all``: the mean over all of them.

    Source: VSE++, arXiv 1707.05612, equations 5 (``all``, there a sum) and 6 (``hardest``).
    """

    use: Literal["triplet"] = "triplet"
    margin: float = Field(default=0.2, gt=0, le=2)
    negatives: Negatives = "hardest"

    @model_validator(mode="after")
    def _one_positive(self) -> Triplet:
        if self.same_label == "positive":
            raise ValueError("same_label: triplet has one positive per anchor; expected 'negative' or 'skip'")
        return self

    def pair_loss(self, pair: Pair, relation: Relation, outputs: Outputs) -> Tensor:
        """The mean of the two directions' losses."""
        forth = triplet(pair.x_BD, pair.y_BD, self.margin, self.negatives, relation, self.chunk)
        back = triplet(pair.y_BD, pair.x_BD, self.margin, self.negatives, relation, self.chunk)
        return (forth + back) / 2


def triplet(
    x_BD: Tensor, y_BD: Tensor, margin: float, negatives: Negatives, relation: Relation, chunk: int = 1024
) -> Tensor:
    """Mean over anchors of ``max(0, margin + d(x, own y) - d(x, other y))`` with ``d = 1 - cosine``; a scalar.

    Args:
        x_BD: unit vectors, the anchors.
        y_BD: their partners, row by row.
        margin: in cosine distance.
        negatives: which other rows count.
        relation: which rows are negatives of each other; an anchor without any adds 0.
        chunk: anchors at a time; a chunk's matrix is made again in the backward pass.
    """
    return mean_over_rows(_chunk_loss, x_BD, relation, chunk, y_BD, margin, negatives)


def _chunk_loss(
    x_CD: Tensor, rows: tuple[Relation, int, int], y_BD: Tensor, margin: float, negatives: Negatives
) -> Tensor:
    relation, start, end = rows
    _, is_negative_CB = relation.chunk(start, end)
    with torch.autocast(x_CD.device.type, enabled=False):
        cosine_CB = wide(x_CD) @ wide(y_BD).T
    own_C1 = cosine_CB[:, start:end].diagonal()[:, None]
    losses_CB = (margin - own_C1 + cosine_CB).clamp_min(0) * is_negative_CB
    if negatives == "hardest":
        return losses_CB.amax(1).sum()
    return (losses_CB.sum(1) / is_negative_CB.sum(1).clamp_min(1)).sum()
