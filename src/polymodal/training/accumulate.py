"""Gradients of several batches as if they were one.

Each objective is a mean over something that it counts: tokens, samples. A batch enters with its share of that count, so
that the sum over the batches is the mean over all of them. Worked example: next-token losses 2.0 over 30 tokens and
1.0 over 10 have shares 0.75 and 0.25, and the mean over all 40 tokens is 1.75.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from polymodal.core.batch import Batch
from polymodal.objectives.table import Losses, WeightedObjective

Shares = dict[str, float]
"""Per objective, the share of one batch."""


def batch_shares(objectives: Sequence[WeightedObjective], batches: Sequence[Batch]) -> list[Shares]:
    """Each batch's share of every objective; an objective that no batch holds anything for has the share 0."""
    result: list[Shares] = [{} for _ in batches]
    for name, _, config in objectives:
        counts = [1] if len(batches) == 1 else [config.count(batch) for batch in batches]
        for shares, count in zip(result, counts, strict=True):
            shares[name] = count / max(1, sum(counts))
    return result


def scaled(objectives: Iterable[WeightedObjective], shares: Shares) -> list[WeightedObjective]:
    """The objectives with weights times shares; those with nothing to say are left out."""
    return [entry._replace(weight=entry.weight * shares[entry.name]) for entry in objectives if shares[entry.name] > 0]


@dataclass(slots=True)
class Mean:
    """The mean of logged values over batches: each objective by its share, each part by the shares of those with it."""

    _sums: dict[str, float] = field(default_factory=dict)
    _shares: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float], shares: Shares) -> None:
        """Take in the values of one batch."""
        for name, value in values.items():
            share = shares[name.partition("/")[0]]
            self._sums[name] = self._sums.get(name, 0.0) + share * value
            self._shares[name] = self._shares.get(name, 0.0) + share

    def values(self) -> dict[str, float]:
        """The means."""
        return {name: self._sums[name] / self._shares[name] for name in self._sums}


def mean_losses(
    objectives: Sequence[WeightedObjective], batches: Iterable[Batch], losses: Callable[[Batch], Losses]
) -> tuple[float, dict[str, float]]:
    """The weighted loss over batches that are read one by one, and each objective's own mean.

    Returns:
        ``(total, means)``; objectives that found nothing to count are in neither, and ``means`` may be empty.
    """
    mean = Mean()
    for batch in batches:
        counts: Shares = {entry.name: float(entry.config.count(batch)) for entry in objectives}
        found = losses(batch)
        values = {name: value for name, value in found.values().items() if counts[name.partition("/")[0]] > 0}
        mean.add(values, counts)
    means = mean.values()
    return sum(entry.weight * means[entry.name] for entry in objectives if entry.name in means), means
