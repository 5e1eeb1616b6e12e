"""Contrast on logits that are already there. Legend: ``V`` videos, ``T`` texts, ``K`` those with a partner."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from polymodal.core.batch import Batch, Outputs
from polymodal.core.passes import Pass
from polymodal.objectives.report import LossReport, ObjectiveConfig, required, wide


class PairContrast(ObjectiveConfig):
    """Each item picks its partner among the batch's, in both directions, by the logits of a ``prompted_pairs`` head.

    Source: X-CLIP, arXiv 2208.02816, section 3.1.
    """

    use: Literal["pair_contrast"] = "pair_contrast"
    needs: ClassVar[Pass] = "pairs"

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The mean of both directions' cross-entropies, in nats; items without a partner are only ever negatives."""
        logits_VT = wide(required(outputs.pair_logits, self.use, "pair_logits", "a prompted_pairs head"))
        videos_V, texts_T = required(outputs.pair_samples, self.use, "pair_samples", "a prompted_pairs head")
        is_pair_VT = videos_V[:, None] == texts_T
        rows, columns = is_pair_VT.any(dim=1), is_pair_VT.any(dim=0)
        if not bool(rows.any()) or min(is_pair_VT.shape) < 2:
            return LossReport(torch.zeros(()))
        targets = is_pair_VT.int()
        picked = F.cross_entropy(logits_VT[rows], targets.argmax(1)[rows])
        picked = picked + F.cross_entropy(logits_VT.T[columns], targets.argmax(0)[columns])
        accuracy = (logits_VT.argmax(1) == targets.argmax(1))[rows].float().mean()
        return LossReport(picked / 2, {"accuracy": accuracy.detach()}, int(rows.sum()))
