"""Next-token prediction on supervised tokens.

Shape legend: ``K`` supervised tokens, ``V`` vocabulary, ``S`` samples.
"""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.config import unknown
from polymodal.core.parts import MODALITIES
from polymodal.objectives.report import LossReport, ObjectiveConfig, Pass, required, wide


class NextToken(ObjectiveConfig):
    """Mean cross-entropy over the supervised tokens, in nats.

    Args:
        average: ``token``: every token counts the same. ``sample``: the mean over samples of each sample's mean, so
            that a long answer weighs no more than a short one.
        weights: per modality, the factor of the samples that hold it; ``text`` stands for samples without media, a
            modality that is not named weighs 1, and a sample with several modalities weighs their mean. The weighted
            sum is divided by the unweighted count, so that a sample's share does not depend on its neighbours.
    """

    use: Literal["next_token"] = "next_token"
    needs: ClassVar[Pass] = "sequence"
    average: Literal["token", "sample"] = "token"
    weights: dict[str, float] = Field(default_factory=dict)

    @field_validator("weights")
    @classmethod
    def _known(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if name not in MODALITIES:
                raise ValueError(unknown("modality", name, MODALITIES))
            if weight < 0:
                raise ValueError(f"the weight of {name} is {weight}, expected 0 or more")
        return weights

    def count(self, batch: Batch) -> int:
        """The supervised tokens, or the samples that have some."""
        if self.average == "token":
            return int(batch.is_supervised.sum())
        if batch.segment_lengths is None:
            return int(batch.is_supervised.any(1).sum())
        ends = [0, *itertools.accumulate(batch.segment_lengths)]
        return sum(bool(batch.is_supervised[0, start:end].any()) for start, end in itertools.pairwise(ends))

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The loss, with one part per modality in the batch."""
        logits_KV = required(outputs.token_logits, self.use, "token_logits", "a next_token head")
        losses_K = token_losses(logits_KV, outputs.token_targets)
        samples_K = outputs.token_samples
        if losses_K.numel() == 0:
            return LossReport(torch.zeros((), device=losses_K.device))
        tokens_S = torch.bincount(samples_K, minlength=batch.num_samples)
        share_K, count = shares(samples_K, tokens_S, self.average)
        names = [modalities or ("text",) for modalities in batch.modalities]
        weight_S = losses_K.new_tensor([sum(self.weights.get(n, 1.0) for n in own) / len(own) for own in names])
        total = (losses_K * share_K * weight_S[samples_K]).sum()
        supervised = [own for own, tokens in zip(names, tokens_S.tolist(), strict=True) if tokens]
        parts = {}
        for name in sorted({n for own in supervised for n in own}):
            held_K = share_K * losses_K.new_tensor([name in own for own in names])[samples_K]
            parts[name] = (losses_K.detach() * held_K).sum() / held_K.sum()
        return LossReport(total, parts, count)


def token_losses(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    """Cross-entropy of each token, float32 ``[K]`` in nats.

    Args:
        logits_KV: scores over the vocabulary.
        targets_K: int64 ids of the tokens that stand there.
    """
    return F.cross_entropy(wide(logits_KV), targets_K, reduction="none")


def shares(samples_K: Tensor, tokens_S: Tensor, average: Literal["token", "sample"]) -> tuple[Tensor, int]:
    """Each token's share of the mean, float32 ``[K]`` with sum 1, and what the mean counts.

    Worked example: tokens of samples ``[0, 0, 1]`` have shares ``1/3 1/3 1/3`` by token (count 3) and
    ``1/4 1/4 1/2`` by sample (count 2).
    """
    if average == "token":
        return torch.full(samples_K.shape, 1.0 / samples_K.numel(), device=samples_K.device), samples_K.numel()
    count = int((tokens_S > 0).sum())
    return 1.0 / (tokens_S[samples_K] * count), count
