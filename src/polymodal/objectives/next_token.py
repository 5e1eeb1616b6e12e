"""Next-token prediction on supervised tokens.

Shape legend: ``K`` supervised tokens, ``V`` vocabulary, ``S`` samples.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.config import unknown
from polymodal.core.parts import MODALITIES
from polymodal.objectives.report import LossReport, ObjectiveConfig, Pass, required, wide

Average = Literal["token", "sample", "answer", "root"]
_POWERS: dict[str, float] = {"token": 0.0, "sample": 1.0, "answer": 1.0, "root": 0.5}
"""A token weighs the number of tokens that it is averaged with to minus this power."""


class NextToken(ObjectiveConfig):
    """Mean cross-entropy over the supervised tokens, in nats.

    Args:
        average: ``token``: every token counts the same. ``sample``: the mean over samples of each sample's mean.
            ``answer``: the mean over answers (runs of supervised tokens; a conversation has several) of each one's
            mean, so that a word weighs as much as a description. ``root``: between the two, an answer weighs the square
            root of its tokens (square averaging, InternVL 2.5, arXiv 2412.05271, section 3.3).
        weights: per modality, the factor of the samples that hold it; ``text`` stands for samples without media, a
            modality that is not named weighs 1, and a sample with several modalities weighs their mean. The weighted
            sum is divided by the unweighted count, so that a sample's share does not depend on its neighbours.
    """

    use: Literal["next_token"] = "next_token"
    needs: ClassVar[Pass] = "sequence"
    average: Average = "token"
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

    def count(self, batch: Batch) -> float:
        """The sum of the tokens' weights: supervised tokens, samples or answers that have some, or answers' roots."""
        # Before a batch goes to its device it holds arrays.
        flat = torch.as_tensor(batch.is_supervised).reshape(-1)
        if self.average == "sample":
            width = batch.ids.shape[-1]
            lengths = batch.segment_lengths or (width,) * (len(flat) // width)
            return sum(bool(each.any()) for each in torch.split(flat, list(lengths)))
        return _count(torch.bincount(answers_of(flat)), self.average)

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The loss, with one part per modality in the batch."""
        logits_KV = required(outputs.token_logits, self.use, "token_logits", "a next_token head")
        losses_K = token_losses(logits_KV, outputs.token_targets)
        samples_K = outputs.token_samples
        if losses_K.numel() == 0:
            return LossReport(torch.zeros((), device=losses_K.device))
        tokens_S = torch.bincount(samples_K, minlength=batch.num_samples)
        in_sample = self.average in ("token", "sample")
        groups_K = samples_K if in_sample else answers_of(batch.is_supervised.reshape(-1))
        share_K, count = shares(groups_K, self.average)
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


def answers_of(is_supervised_T: Tensor) -> Tensor:
    """Number of the answer that each supervised token belongs to, int64 ``[K]``: answers are runs of such tokens.

    Worked example: ``[0 1 1 0 1]`` gives ``[0 0 1]``. The first token of a sample is never supervised, so that no run
    reaches from one sample into the next, packed or padded.
    """
    before_T = F.pad(is_supervised_T, (1, 0))[:-1]
    return ((is_supervised_T & ~before_T).cumsum(0) - 1)[is_supervised_T]


def shares(groups_K: Tensor, average: Average) -> tuple[Tensor, float]:
    """Each token's share of the mean, float32 ``[K]`` with sum 1, and what the mean counts.

    Worked example: tokens of groups ``[0, 0, 1]`` have shares ``1/3 1/3 1/3`` by token (count 3) and ``1/4 1/4 1/2`` by
    sample or answer (count 2).

    Args:
        groups_K: the sample, or the answer, that each token belongs to.
        average: see :class:`NextToken`.
    """
    tokens_G = torch.bincount(groups_K)
    count = _count(tokens_G, average)
    return tokens_G[groups_K].float() ** -_POWERS[average] / count, count


def _count(tokens_G: Tensor, average: Average) -> float:
    found_G = tokens_G[tokens_G > 0]
    if average == "token":
        return int(found_G.sum())
    return len(found_G) if average != "root" else float(found_G.double().sqrt().sum())
