"""Connectionist temporal classification: the likelihood of a transcript over all its alignments.

Shape legend: ``I`` items, ``N`` features, ``V`` vocabulary, ``K`` tokens of a transcript.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import ConfigError
from polymodal.objectives.report import LossReport, ObjectiveConfig, Pass, required, wide


class Ctc(ObjectiveConfig):
    """Mean over recordings of each one's loss per token of its transcript, in nats; a sample's label is its transcript.

    A recording with fewer features than its transcript needs (one for each token, and a blank between equal
    neighbours) has no alignment; it is left out and counted in the log as ``too_short``.

    Source: Graves et al. 2006, "Connectionist Temporal Classification", section 4.
    """

    use: Literal["ctc"] = "ctc"
    needs: ClassVar[Pass] = "ctc"

    def count(self, batch: Batch) -> int:
        """The samples that have a transcript."""
        return sum(bool(label) for label in batch.labels)

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The loss of the recordings whose sample has a transcript.

        Raises:
            ConfigError: if the model has no ctc head, or a transcript holds a character that it does not know.
        """
        found = required(outputs.ctc, self.use, "ctc", "a ctc head")
        owners = found.sample_of_item.tolist()
        rows, targets = [], []
        short = 0
        for row, owner in enumerate(owners):
            label = batch.labels[owner]
            if not label:
                continue
            ids = found.encode(label)
            if needed_features(ids) > int(found.lengths[row]):
                short += 1
                continue
            rows.append(row)
            targets.append(ids)
        parts = {"too_short": torch.tensor(float(short))}
        if not rows:
            return LossReport(torch.zeros(()), parts)
        index = torch.tensor(rows, device=found.logits.device)
        loss = ctc_loss(found.logits[index], found.lengths[index], targets, found.blank)
        return LossReport(loss.mean(), parts, len(rows))


def needed_features(ids: Sequence[int]) -> int:
    """Features that a transcript needs at least.

    Worked example: ``a b b`` needs 4, for ``a b - b``.
    """
    return len(ids) + sum(first == second for first, second in pairwise(ids))


def ctc_loss(logits_INV: Tensor, lengths_I: Tensor, targets: Sequence[Sequence[int]], blank: int) -> Tensor:
    """Negative log-likelihood of each transcript, divided by its number of tokens: ``[I]``, in nats.

    Args:
        logits_INV: scores of every feature; those beyond a length are not read.
        lengths_I: valid features of each item.
        targets: token ids of each transcript, without blanks; each is alignable (:func:`needed_features`).
        blank: id of the blank.

    Raises:
        ConfigError: if a transcript holds the blank, or none of its tokens.
    """
    if any(blank in ids or not ids for ids in targets):
        raise ConfigError("ctc: found a transcript that is empty or holds the blank, expected tokens of speech")
    sizes_I = torch.tensor([len(ids) for ids in targets], device=logits_INV.device)
    flat = torch.tensor([index for ids in targets for index in ids], device=logits_INV.device)
    log_probs_NIV = wide(logits_INV).log_softmax(dim=-1).transpose(0, 1)
    losses_I = F.ctc_loss(log_probs_NIV, flat, lengths_I, sizes_I, blank=blank, reduction="none")
    return losses_I / sizes_I
