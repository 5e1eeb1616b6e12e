"""Do the parts of a sample belong together? Binary cross-entropy on the matching head.

Shape legend: ``S`` samples.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.config import unknown
from polymodal.core.errors import SampleError
from polymodal.objectives.report import LossReport, ObjectiveConfig, Pass, required, wide


class Matching(ObjectiveConfig):
    """Binary cross-entropy on ``match_logits``; targets are passed, or read from the samples' labels, or made.

    Args:
        negatives: ``labels``: the samples' labels say which belong together; ``batch``: every sample does, and beside
            it stands one with a stream of another sample of the batch, drawn at random (ALBEF, arXiv 2107.07651,
            section 3.2, without its mining of hard negatives); ``hard``: as there, beside it stands, for every two of
            its streams, one with the second from a sample that looks alike in the shared space.
        same_label: what two samples with one label, or without labels with equal texts, are to each other where
            negatives are made: ``skip`` (never mixed; a sample for which no other is left is left out of the loss) or,
            with ``batch``, ``negative`` (labels are not looked at).
        positive: the label of a sample whose parts belong together.
        negative: of one whose parts do not.
    """

    use: Literal["matching"] = "matching"
    negatives: Literal["labels", "batch", "hard"] = "labels"
    same_label: Literal["skip", "negative"] = "skip"
    positive: str = "match"
    negative: str = "mismatch"

    @model_validator(mode="after")
    def _different(self) -> Matching:
        if self.positive == self.negative:
            raise ValueError(f"positive and negative are both {self.positive!r}, expected two labels")
        if self.same_label == "negative" and self.negatives != "batch":
            raise ValueError(
                f"same_label: found 'negative' with negatives: {self.negatives}, expected 'skip', or negatives: batch"
            )
        return self

    @property
    def needs(self) -> Pass:  # type: ignore[override]
        """``match``, ``match_any`` or ``match_hard`` where negatives are made, ``merge`` where labels name them."""
        if self.same_label == "negative":
            return "match_any"
        return {"batch": "match", "hard": "match_hard", "labels": "merge"}[self.negatives]

    def count(self, batch: Batch) -> int:
        """The samples that have a label; all of them where mismatches are made."""
        return batch.num_samples if self.negatives != "labels" else sum(label is not None for label in batch.labels)

    def __call__(self, outputs: Outputs, batch: Batch, targets_S: Tensor | None = None) -> LossReport:
        """The loss, in nats.

        Args:
            outputs: with ``match_logits``.
            batch: whose labels are the targets where none are passed; a sample without a label is left out.
            targets_S: bool or float in [0, 1], such as mined hard negatives give.

        Raises:
            SampleError: if a label is neither of the two.
        """
        logits_S = required(outputs.match_logits, self.use, "match_logits", "a matching head")
        if targets_S is None and self.negatives != "labels":
            false_N = required(outputs.mismatch_logits, self.use, "mismatch_logits", "a matching head")
            # Of hard negatives a sample has several, and itself counts once (ALBEF).
            samples = outputs.mismatch_samples
            true_N = logits_S[samples if self.negatives == "batch" else torch.unique(samples)]
            logits_S = torch.cat([true_N, false_N])
            targets_S = torch.cat([torch.ones_like(true_N), torch.zeros_like(false_N)])
        elif targets_S is None:
            targets = [self._target(name, label) for name, label in zip(batch.sample_ids, batch.labels, strict=True)]
            rows = [row for row, target in enumerate(targets) if target is not None]
            targets_S = torch.tensor([targets[row] for row in rows], dtype=torch.float32, device=logits_S.device)
            logits_S = logits_S[torch.tensor(rows, dtype=torch.long, device=logits_S.device)]
        if len(logits_S) == 0:
            return LossReport(torch.zeros(()))
        total = matching(logits_S, targets_S)
        accuracy = ((logits_S > 0) == (targets_S > 0.5)).float().mean()
        return LossReport(total, {"accuracy": accuracy.detach()}, len(logits_S))

    def _target(self, sample: str, label: str | None) -> float | None:
        if label is None:
            return None
        if label not in (self.positive, self.negative):
            raise SampleError(
                sample, f"objective {self.use}: {unknown('label', label, (self.positive, self.negative))}"
            )
        return float(label == self.positive)


def matching(logits_S: Tensor, targets_S: Tensor) -> Tensor:
    """Mean binary cross-entropy of ``logits_S`` against ``targets_S`` in [0, 1]; a scalar in nats."""
    return F.binary_cross_entropy_with_logits(wide(logits_S), targets_S.to(wide(logits_S).dtype))
