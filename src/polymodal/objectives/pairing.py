"""Two streams side by side: which embeddings describe the same sample, and which samples share a label.

Shape legend: ``I`` items of a stream, ``B`` samples that have both streams, ``D`` width, ``C`` rows of a chunk.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from polymodal.core.batch import Batch, Outputs, group_numbers
from polymodal.core.errors import ConfigError
from polymodal.objectives.report import LossReport, ObjectiveConfig, Pass

SameLabel = Literal["negative", "skip", "positive"]
"""What two samples with one label are to each other: negatives, neither, or positives."""


class Pair(NamedTuple):
    """Embeddings of the samples that have both streams, row by row.

    Args:
        x_BD: unit vectors of the first stream; y_BD: of the second; samples_B: int64 which sample a row is. One of the
            two may have several vectors of each item, ``[B, M, D]``.
    """

    x_BD: Tensor
    y_BD: Tensor
    samples_B: Tensor


def pair_streams(outputs: Outputs, first: str, second: str, *, takes_several: bool = False) -> Pair | None:
    """Pair two streams by sample; of several items of one sample the first is taken. None if no sample has both.

    Worked example: items of samples ``[0, 0, 2]`` and ``[1, 2]`` give one row, sample 2: items 2 and 1.

    Args:
        outputs: with the embeddings.
        first: a stream.
        second: another.
        takes_several: whether the items of one of the two may have several vectors, ``[I, M, D]``.

    Raises:
        ConfigError: if there are more than the loss takes.
    """
    if first not in outputs.embeddings or second not in outputs.embeddings:
        return None
    x_ID, x_samples_I = outputs.embeddings[first]
    y_ID, y_samples_I = outputs.embeddings[second]
    if x_ID.ndim + y_ID.ndim > 4 + takes_several:
        raise ConfigError(
            f"contrast of {first!r} and {second!r}: found vectors of shape {list(x_ID.shape)} and {list(y_ID.shape)}, "
            f"expected one per item{' of one of them' if takes_several else ''}; 'infonce' takes several on one side"
        )
    x_of, y_of = _first_items(x_samples_I), _first_items(y_samples_I)
    both = sorted(x_of.keys() & y_of.keys())
    if not both:
        return None
    rows_x = torch.tensor([x_of[sample] for sample in both], device=x_ID.device)
    rows_y = torch.tensor([y_of[sample] for sample in both], device=y_ID.device)
    return Pair(x_ID[rows_x], y_ID[rows_y], torch.tensor(both, device=x_ID.device))


def _first_items(samples_I: Tensor) -> dict[int, int]:
    first: dict[int, int] = {}
    for item, sample in enumerate(samples_I.tolist()):
        first.setdefault(sample, item)
    return first


def label_groups(batch: Batch, samples_B: Tensor) -> Tensor:
    """An int64 number per row, equal exactly for rows with equal labels; a row without a label is alone."""
    return torch.tensor(group_numbers(batch.labels[sample] for sample in samples_B.tolist()), device=samples_B.device)


class Relation(NamedTuple):
    """Which rows of ``x`` and ``y`` belong together; made a chunk of rows at a time, never ``[B, B]``.

    Args:
        groups_B: int64 number of each row's group; rows of one group are treated as ``same`` says.
        same: what rows of one group are to each other; a row and its own partner are always positive.
    """

    groups_B: Tensor
    same: SameLabel = "negative"

    def chunk(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """``(is_positive_CB, is_negative_CB)`` of the rows ``start .. end``; skipped pairs are in neither."""
        rows_C = torch.arange(start, end, device=self.groups_B.device)
        columns_B = torch.arange(len(self.groups_B), device=self.groups_B.device)
        is_own_CB = rows_C[:, None] == columns_B[None, :]
        if self.same == "negative":
            return is_own_CB, ~is_own_CB
        is_same_CB = self.groups_B[rows_C][:, None] == self.groups_B[None, :]
        return (is_own_CB if self.same == "skip" else is_same_CB), ~is_same_CB

    def positives(self) -> Tensor:
        """int64 ``[B]``: how many positives each row has, itself included."""
        if self.same != "positive":
            return torch.ones_like(self.groups_B)
        _, group_B, counts = torch.unique(self.groups_B, return_inverse=True, return_counts=True)
        return torch.index_select(counts, 0, group_B)


class PairObjective(ObjectiveConfig):
    """Base of the losses over pairs of streams: the mean over the pairs that the batch holds.

    Args:
        pairs: pairs of stream names; empty: every two streams that have embeddings.
        same_label: what two samples with one label are to each other: ``negative`` (labels are not looked at),
            ``skip`` (left out of the loss) or ``positive``.
        chunk: rows of the similarity matrix that are held at a time.
    """

    needs: ClassVar[Pass] = "embed"
    min_rows: ClassVar[int] = 2
    takes_several: ClassVar[bool] = False
    pairs: tuple[tuple[str, str], ...] = ()
    same_label: SameLabel = "negative"
    chunk: int = Field(default=1024, ge=1)

    @field_validator("pairs")
    @classmethod
    def _different(cls, pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        seen: set[frozenset[str]] = set()
        for first, second in pairs:
            if first == second:
                raise ValueError(f"the pair [{first}, {second}] names one stream twice, expected two streams")
            if frozenset((first, second)) in seen:
                raise ValueError(f"the pair [{first}, {second}] stands there twice")
            seen.add(frozenset((first, second)))
        return pairs

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that ``pairs`` names."""
        return tuple(dict.fromkeys(name for pair in self.pairs for name in pair))

    def pair_loss(self, pair: Pair, relation: Relation, outputs: Outputs) -> Tensor:
        """The scalar loss of one pair of streams."""
        raise NotImplementedError

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The mean loss over the pairs with at least ``min_rows`` samples, one part per pair (``image-text``)."""
        losses: dict[str, Tensor] = {}
        count = 0
        for first, second in self.pairs or itertools.combinations(sorted(outputs.embeddings), 2):
            pair = pair_streams(outputs, first, second, takes_several=self.takes_several)
            if pair is None or len(pair.samples_B) < self.min_rows:
                continue
            relation = Relation(label_groups(batch, pair.samples_B), self.same_label)
            scaled = outputs
            if outputs.pair_scale is not None:
                scaled = replace(outputs, scale=outputs.pair_scale(first, second))
            losses[f"{first}-{second}"] = self.pair_loss(pair, relation, scaled)
            count += len(pair.samples_B)
        if not losses:
            return LossReport(torch.zeros(()))
        total = torch.stack(list(losses.values())).mean()
        return LossReport(total, {name: loss.detach() for name, loss in losses.items()}, count)
