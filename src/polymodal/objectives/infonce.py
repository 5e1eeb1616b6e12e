"""InfoNCE between paired embeddings, in memory linear in the batch.

Shape legend: ``B`` pairs, ``C`` rows of a chunk, ``M`` vectors of one item, ``D`` width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from polymodal.core.batch import Outputs
from polymodal.objectives.pairing import Pair, PairObjective, Relation
from polymodal.objectives.report import required, wide


class InfoNCE(PairObjective):
    """Symmetric InfoNCE: each item picks its partner among the batch's, in both directions.

    Args:
        temperature: a fixed temperature; None: the learned scale of the projection head.

    Source: CLIP, arXiv 2103.00020, figure 3; ``same_label: positive`` is SupCon's outside-the-log mean over
    positives, arXiv 2004.11362, equation 2, with the anchor's own partner counted. Items of several vectors (a
    Q-Former's queries): BLIP-2, arXiv 2301.12597, section 3.2.
    """

    takes_several: ClassVar[bool] = True

    use: Literal["infonce"] = "infonce"
    temperature: float | None = Field(default=None, gt=0)

    def pair_loss(self, pair: Pair, relation: Relation, outputs: Outputs) -> Tensor:
        """The loss of one pair of streams, in nats."""
        if self.temperature is not None:
            scale = pair.x_BD.new_tensor(1.0 / self.temperature, dtype=torch.float32)
        else:
            scale = required(outputs.scale, self.use, "scale", "a projection head (or give 'temperature')")
        if pair.x_BD.ndim == 3:
            return best_infonce(pair.x_BD, pair.y_BD, scale, relation)
        if pair.y_BD.ndim == 3:
            return best_infonce(pair.y_BD, pair.x_BD, scale, relation)
        return infonce(pair.x_BD, pair.y_BD, scale, relation, self.chunk)


def best_infonce(x_BMD: Tensor, y_BD: Tensor, scale: Tensor, relation: Relation) -> Tensor:
    """:func:`infonce` where an item of one side has several vectors: it is as similar as the best of them.

    All ``[B, M, B]`` similarities are held.
    """
    x_BMD, y_BD = wide(x_BMD), wide(y_BD)
    is_positive_BB, is_negative_BB = relation.chunk(0, len(y_BD))
    with torch.autocast(x_BMD.device.type, enabled=False):
        logits_BB = wide(scale) * (x_BMD @ y_BD.T).amax(1)
    if relation.same == "skip":
        logits_BB = logits_BB.masked_fill(~(is_positive_BB | is_negative_BB), float("-inf"))
    attraction_B = torch.where(is_positive_BB, logits_BB, 0.0).sum(1) / relation.positives()
    return (logits_BB.logsumexp(1) + logits_BB.logsumexp(0) - 2 * attraction_B).mean() / 2


def infonce(x_BD: Tensor, y_BD: Tensor, scale: Tensor, relation: Relation, chunk: int = 1024) -> Tensor:
    """Mean of the two directions' cross-entropies, a scalar in nats.

    ``[B, B]`` is never held: rows are taken ``chunk`` at a time, and the backward pass makes them again.

    Args:
        x_BD: unit vectors.
        y_BD: their partners, row by row.
        scale: scalar, the inverse temperature.
        relation: which rows are positives and negatives of each other.
        chunk: rows at a time.
    """
    x_BD, y_BD = wide(x_BD), wide(y_BD)
    result: Tensor = _ChunkedInfoNCE.apply(x_BD, y_BD, wide(scale), relation, chunk)  # type: ignore[no-untyped-call]
    return result


class _ChunkedInfoNCE(torch.autograd.Function):
    """Forward keeps the two log-normalisers ``[B]``; backward rebuilds each chunk's softmax from them."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, y_BD: Tensor, scale: Tensor, relation: Relation, chunk: int) -> Tensor:
        size = len(x_BD)
        positives_B = relation.positives().to(x_BD.dtype)
        rows_B, columns_B = x_BD.new_empty(size), x_BD.new_full((size,), float("-inf"))
        attraction = x_BD.new_zeros(())
        for start in range(0, size, chunk):
            end = min(start + chunk, size)
            logits_CB, is_positive_CB = _logits(x_BD, y_BD, scale, relation, start, end)
            rows_B[start:end] = logits_CB.logsumexp(1)
            columns_B = torch.logaddexp(columns_B, logits_CB.logsumexp(0))
            drawn_C = torch.where(is_positive_CB, logits_CB, 0.0).sum(1)
            attraction += (drawn_C / positives_B[start:end]).sum()
        ctx.save_for_backward(x_BD, y_BD, scale, rows_B, columns_B, positives_B)
        ctx.relation, ctx.chunk = relation, chunk
        # Positives are mutual and groups have one size for rows and columns: both directions are drawn alike.
        return (rows_B.sum() + columns_B.sum() - 2 * attraction) / (2 * size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, y_BD, scale, rows_B, columns_B, positives_B = ctx.saved_tensors
        size = len(x_BD)
        dx_BD, dy_BD, dscale = torch.empty_like(x_BD), torch.zeros_like(y_BD), torch.zeros_like(scale)
        for start in range(0, size, ctx.chunk):
            end = min(start + ctx.chunk, size)
            logits_CB, is_positive_CB = _logits(x_BD, y_BD, scale, ctx.relation, start, end)
            dlogits_CB = (logits_CB - rows_B[start:end, None]).exp_()
            dlogits_CB += (logits_CB - columns_B[None, :]).exp_()
            dlogits_CB -= is_positive_CB * (2.0 / positives_B[start:end, None])
            dlogits_CB *= grad / (2 * size)
            with torch.autocast(x_BD.device.type, enabled=False):
                mixed_CD = dlogits_CB @ y_BD
                dx_BD[start:end] = scale * mixed_CD
                dy_BD += scale * (dlogits_CB.T @ x_BD[start:end])
            dscale += (mixed_CD * x_BD[start:end]).sum()
        return dx_BD, dy_BD, dscale, None, None


def _logits(
    x_BD: Tensor, y_BD: Tensor, scale: Tensor, relation: Relation, start: int, end: int
) -> tuple[Tensor, Tensor]:
    """Scaled similarities of a chunk, minus infinity where a pair is skipped, and which are positive."""
    is_positive_CB, is_negative_CB = relation.chunk(start, end)
    with torch.autocast(x_BD.device.type, enabled=False):
        logits_CB = scale * (x_BD[start:end] @ y_BD.T)
    if relation.same == "skip":
        logits_CB = logits_CB.masked_fill(~(is_positive_CB | is_negative_CB), float("-inf"))
    return logits_CB, is_positive_CB
