"""Masked modelling and captions: what a masked_token head says of hidden or coming places.

Legend: ``K`` predicted places, ``V`` vocabulary, codes, or values of a patch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from polymodal.core.batch import Batch, Outputs
from polymodal.core.passes import Pass, TokenPass
from polymodal.objectives.distill import divergence
from polymodal.objectives.report import LossReport, ObjectiveConfig, TwinNeed, required, wide


class TokenObjective(ObjectiveConfig):
    """Base of the objectives that read a masked_token head."""

    head: str = ""
    """Name of the head; empty: the only masked_token head that fits."""

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The mean loss over the predicted places: cross-entropy in nats, or the squared error of normalised pixels."""
        found = outputs.tokens.get(self.needs)  # type: ignore[arg-type]
        predictions_KV = required(found, self.use, "tokens", "a masked_token head").predictions  # type: ignore[attr-defined]
        if found is None or predictions_KV is None or not len(predictions_KV):
            return LossReport(torch.zeros(()))
        predictions_KV, targets = wide(predictions_KV), found.targets
        if targets.is_floating_point():
            return LossReport(F.mse_loss(predictions_KV, wide(targets)), {}, len(targets))
        accuracy = (predictions_KV.detach().argmax(1) == targets).float().mean()
        return LossReport(F.cross_entropy(predictions_KV, targets), {"accuracy": accuracy}, len(targets))


class _Masked(TokenObjective):
    mask: dict[str, float]

    @field_validator("mask")
    @classmethod
    def _shares(cls, mask: dict[str, float]) -> dict[str, float]:
        if not mask or any(not 0 < rate < 1 for rate in mask.values()):
            raise ValueError(f"found the shares {mask}, expected one above 0 and below 1 for each hidden stream")
        return mask

    @property
    def needs(self) -> Pass:  # type: ignore[override]
        """The pass in which these shares are hidden."""
        return TokenPass("masked", self.head, tuple(sorted(self.mask.items())))

    def count(self, batch: Batch) -> int:
        """The tokens or patches of the hidden streams, of which a share is predicted."""
        return sum(_total(batch.streams[name].lengths) for name in self.mask if name in batch.streams)


class MaskedText(_Masked):
    """Predict hidden tokens of a text (BERT, arXiv 1810.04805, section 3.1), from all streams that are there.

    Args:
        mask: per stream, the share that is hidden; with pictures too, both are hidden in one run (FLAVA, BEiT-3).
        alpha: weight of the divergence from what the momentum twin predicts of the same hidden places; ``1 - alpha`` is
            that of what stood there (ALBEF, arXiv 2107.07651, section 3.4, equation 7: 0.4). 0: no twin. Where there
            is none (a validation loss), only what stood there counts.
        decay: of the twin's weights, per step.
    """

    use: Literal["masked_text"] = "masked_text"
    mask: dict[str, float] = Field(default_factory=lambda: {"text": 0.15})
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.995

    @property
    def twin(self) -> TwinNeed | None:
        """The twin that predicts the same places."""
        return TwinNeed(self.decay, 0, (self.needs,)) if self.alpha else None

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """See :class:`TokenObjective`; the twin's part in it as ``twin``."""
        report = super().__call__(outputs, batch)
        taught = None if outputs.teacher is None or not self.alpha else outputs.teacher.tokens.get(self.needs)  # type: ignore[arg-type]
        if taught is None or not report.count:
            return report
        predictions_KV = outputs.tokens[self.needs].predictions  # type: ignore[index]
        apart = divergence(predictions_KV, taught.predictions, 1.0)
        total = (1 - self.alpha) * report.total + self.alpha * apart
        return LossReport(total, {**report.parts, "twin": apart.detach()}, report.count)


class MaskedImage(_Masked):
    """Predict hidden blocks of patches: their pixels, or a frozen codec's codes for them; the head says which.

    Source: SimMIM, arXiv 2111.09886, section 3.3 (pixels); BEiT, arXiv 2106.08254, section 2 (blocks, codes).

    Args:
        mask: per stream, the share that is hidden.
    """

    use: Literal["masked_image"] = "masked_image"
    mask: dict[str, float] = Field(default_factory=lambda: {"image": 0.4})


class Caption(TokenObjective):
    """Each token of a text from those before it and from all other streams, which are its prefix.

    Source: prefix language modelling, UniLM, arXiv 1905.03197, section 2.3; BLIP, arXiv 2201.12086, section 3.2, whose
    text sees the image by cross-attention. The first token is given: a tokenizer's start token, or the first word.

    Args:
        stream: the text, for the share of a batch in a step.
    """

    use: Literal["caption"] = "caption"
    stream: str = "text"

    @property
    def needs(self) -> Pass:  # type: ignore[override]
        """The pass in which the text of the head sees only what stands before it."""
        return TokenPass("caption", self.head)

    def count(self, batch: Batch) -> int:
        """The tokens that have one before them."""
        stream = batch.streams.get(self.stream)
        return 0 if stream is None else _total(stream.lengths) - len(stream.lengths)


def _total(lengths: Any) -> int:
    return int(lengths.sum())
