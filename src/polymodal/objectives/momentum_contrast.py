"""Contrast with a momentum twin: its vectors of this batch and of earlier ones, and its doubts, are the targets.

Shape legend: ``B`` pairs, ``Q`` vectors of the queue, ``D`` width.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from polymodal.core.batch import Batch, Outputs, Teacher
from polymodal.objectives.infonce import infonce
from polymodal.objectives.pairing import Pair, PairObjective, Relation, SameLabel, label_groups, pair_streams
from polymodal.objectives.report import LossReport, TwinNeed, required, wide


class MomentumContrast(PairObjective):
    """Each item picks its partner among the twin's vectors of the batch and of a queue, in both directions.

    Targets are the partner with weight ``1 - alpha`` and the twin's own choice with weight ``alpha``. Where there is no
    twin (a validation loss), it is plain InfoNCE over the batch.

    Source: ALBEF, arXiv 2107.07651, sections 3.2 and 3.3, equations 1 and 5; MoCo, arXiv 1911.05722, section 3.2. The
    twin runs without dropout.

    Args:
        decay: of the twin's weights, per step.
        queue: vectors of each stream that are kept.
        alpha: weight of the twin's choice.
    """

    use: Literal["momentum_contrast"] = "momentum_contrast"
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    queue: int = Field(default=65_536, ge=0)
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4

    @property
    def twin(self) -> TwinNeed:
        """The twin and the queues that it needs."""
        return TwinNeed(self.decay, self.queue)

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The mean loss over the pairs of streams, one part per pair (``image-text``)."""
        losses: dict[str, Tensor] = {}
        count = 0
        for first, second in self.pairs or itertools.combinations(sorted(outputs.embeddings), 2):
            pair = pair_streams(outputs, first, second)
            if pair is None or len(pair.samples_B) < self.min_rows:
                continue
            losses[f"{first}-{second}"] = self._loss(pair, (first, second), outputs, batch)
            count += len(pair.samples_B)
        if not losses:
            return LossReport(torch.zeros(()))
        total = torch.stack(list(losses.values())).mean()
        return LossReport(total, {name: loss.detach() for name, loss in losses.items()}, count)

    def _loss(self, pair: Pair, names: tuple[str, str], outputs: Outputs, batch: Batch) -> Tensor:
        scale = required(outputs.scale, self.use, "scale", "a projection head")
        if outputs.teacher is None:
            relation = Relation(label_groups(batch, pair.samples_B), self.same_label)
            return infonce(pair.x_BD, pair.y_BD, scale, relation, self.chunk)
        taught = pair_streams(Outputs(embeddings=outputs.teacher.embeddings), *names)
        assert taught is not None
        groups_B = sample_groups(batch, pair.samples_B)
        forth, back = (
            momentum_contrast(
                Anchors(wide(x_BD), wide(taught_x), groups_B),
                *_targets(outputs.teacher, name, taught_y, groups_B),
                wide(scale),
                (self.alpha, self.same_label),
            )
            for x_BD, taught_x, taught_y, name in (
                (pair.x_BD, taught.x_BD, taught.y_BD, names[1]),
                (pair.y_BD, taught.y_BD, taught.x_BD, names[0]),
            )
        )
        return (forth + back) / 2


class Anchors(NamedTuple):
    """Items that look for their partners.

    Args:
        x_BD: their unit vectors; taught_BD: the twin's of the same items; groups_B: int64 number of each one's label.
    """

    x_BD: Tensor
    taught_BD: Tensor
    groups_B: Tensor


def _targets(teacher: Teacher, name: str, taught_BD: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """The twin's vectors ``[B + Q, D]`` of a stream, those of the batch first, and their groups."""
    queue_QD, groups_Q = teacher.queues[name], teacher.groups[name]
    return torch.cat([wide(taught_BD), wide(queue_QD)]), torch.cat([groups_B, groups_Q])


def momentum_contrast(
    anchors: Anchors, y_CD: Tensor, groups_C: Tensor, scale: Tensor, options: tuple[float, SameLabel]
) -> Tensor:
    """Mean cross-entropy of one direction, a scalar in nats.

    Args:
        anchors: ``B`` items; row b's partner is row b of ``y_CD``.
        y_CD: candidates, ``C = B + Q``.
        groups_C: int64 numbers of their labels.
        scale: scalar, the inverse temperature.
        options: weight of the twin's choice, and what candidates of an anchor's label are to it.
    """
    alpha, same_label = options
    logits_BC = scale * anchors.x_BD @ y_CD.T
    is_own_BC = torch.eye(len(anchors.x_BD), len(y_CD), dtype=torch.bool, device=y_CD.device)
    is_same_BC = anchors.groups_B[:, None] == groups_C
    if same_label == "skip":
        logits_BC = logits_BC.masked_fill(is_same_BC & ~is_own_BC, -torch.inf)
    is_positive_BC = is_same_BC | is_own_BC if same_label == "positive" else is_own_BC
    targets_BC = is_positive_BC / is_positive_BC.sum(1, keepdim=True)
    if alpha:
        with torch.no_grad():
            doubts_BC = (scale * anchors.taught_BD @ y_CD.T).masked_fill(logits_BC.isneginf(), -torch.inf).softmax(1)
        targets_BC = (1 - alpha) * targets_BC + alpha * doubts_BC
    # Candidates that are skipped have a target of zero; zero times minus infinity is not zero.
    log_chances_BC = logits_BC.log_softmax(1).masked_fill(logits_BC.isneginf(), 0.0)
    return -(targets_BC * log_chances_BC).sum(1).mean()


def sample_groups(batch: Batch, samples: Tensor | Sequence[int]) -> Tensor:
    """int64 numbers, equal for samples of one label, in any batch and any run; without a label, for one sample."""
    numbers = []
    for sample in samples.tolist() if isinstance(samples, Tensor) else samples:
        label = batch.labels[sample]
        key = f"sample {batch.sample_ids[sample]}" if label is None else f"label {label}"
        numbers.append(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest()))
    device = samples.device if isinstance(samples, Tensor) else None
    return torch.tensor(numbers, dtype=torch.int64, device=device)
