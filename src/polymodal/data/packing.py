"""Groups samples into batches: packs that fill a token budget, or groups of a fixed number of samples.

Both hold planned samples and say when they want more. Their state is the list of the places of those samples;
re-planning the places in the same order restores them.

Shape legend: ``C`` capacity + 1.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from polymodal.core.batch import Plan
from polymodal.core.errors import ConfigError, SampleError

Place = tuple[int, int]
"""Where a sample comes from: (source, position in that source)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A planned sample, its place, and how many groups were taken while it was held."""

    place: Place
    plan: Plan
    age: int = 0


class Grouper(Protocol):
    """What a loader asks of a :class:`Packer` or a :class:`FixedGroups`."""

    @property
    def is_full(self) -> bool:
        """Whether the next group can be taken as well as it ever will be."""

    def add(self, entry: Entry) -> None:
        """Hold a planned sample."""

    def take(self) -> list[Entry]:
        """Remove and return the next group; empty if nothing is held."""

    def held(self) -> list[Entry]:
        """The held samples, in the order they came; their places and ages are the whole state."""


class FixedGroups:
    """Groups of ``samples`` samples in the order they came; the last one may be smaller.

    Args:
        samples: samples of a group; at least 1.
        one_source: whether all samples of a group come from the same source.
    """

    def __init__(self, samples: int, one_source: bool = False) -> None:
        self._samples = samples
        self._one_source = one_source
        self._held: deque[Entry] = deque()

    @property
    def is_full(self) -> bool:
        """Whether a whole group is held."""
        if self._one_source:
            return max(Counter(entry.place[0] for entry in self._held).values(), default=0) >= self._samples
        return len(self._held) >= self._samples

    def add(self, entry: Entry) -> None:
        """Hold a planned sample."""
        self._held.append(entry)

    def take(self) -> list[Entry]:
        """The oldest samples, at most one group (of the source that holds most); empty if nothing is held."""
        if not self._one_source:
            return [self._held.popleft() for _ in range(min(self._samples, len(self._held)))]
        if not self._held:
            return []
        source = Counter(entry.place[0] for entry in self._held).most_common(1)[0][0]
        taken = [entry for entry in self._held if entry.place[0] == source][: self._samples]
        gone = {entry.place for entry in taken}
        self._held = deque(entry for entry in self._held if entry.place not in gone)
        return taken

    def held(self) -> list[Entry]:
        """The held samples, in the order they came."""
        return list(self._held)


class Packer:
    """Packs of whole samples, chosen so that this pack and the later ones are full.

    Each pack is the most valuable set of held samples that fits (an exact knapsack). A sample's value is its length,
    raised a little by its length (so that short samples, which fit anywhere, are kept for later gaps) and by its age.
    The buffer is refilled before every pack: draining it would leave misfits for the last packs. A sample that was
    passed over ``4 * buffer`` times goes first, one in each pack, so that none starves.

    Within a pack samples are ordered by length, so that attention can run equal lengths as one batch.

    Worked example: capacity 10, lengths held ``[6, 5, 3, 4]``: first ``[4, 6]``, which is full; then ``[3, 5]``.

    Args:
        capacity: tokens of a pack; no sample may be longer, and none is ever cut.
        buffer: how many samples are held for the choice, at least; more are held while they fill less than two packs.
            64 fills mixes of text and images above 0.99.
        max_samples: most samples in one pack; None for any number.

    Raises:
        ConfigError: if a number is below 1.
    """

    def __init__(self, capacity: int, buffer: int = 64, max_samples: int | None = None) -> None:
        for name, value in (("capacity", capacity), ("buffer", buffer), ("max_samples", max_samples)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: found {value}, expected at least 1")
        self.capacity = capacity
        self.buffer = buffer
        self.max_samples = max_samples
        self._held: list[Entry] = []
        self._tokens = 0

    @property
    def is_full(self) -> bool:
        """Whether ``buffer`` samples and the tokens of two packs are held."""
        return len(self._held) >= self.buffer and self._tokens >= 2 * self.capacity

    def add(self, entry: Entry) -> None:
        """Hold a planned sample.

        Raises:
            SampleError: if it is longer than a pack, or has no tokens to pack.
        """
        length = entry.plan.num_tokens
        if length > self.capacity:
            raise SampleError(
                entry.plan.id,
                f"has {length:,} tokens, a pack holds {self.capacity:,} and samples are never cut; raise the batch's "
                "tokens, give its media fewer tokens, or split the sample",
            )
        if length == 0:
            raise SampleError(
                entry.plan.id, "has no tokens to pack (it is a view set); set the batch by samples instead of by tokens"
            )
        self._held.append(entry)
        self._tokens += length

    def take(self) -> list[Entry]:
        """The next pack, shortest sample first; empty if nothing is held."""
        if not self._held:
            return []
        ages = [entry.age for entry in self._held]
        first = [ages.index(max(ages))] if max(ages) >= 4 * self.buffer else []
        lengths = [entry.plan.num_tokens for entry in self._held]
        values = [
            length * (8 * self.capacity + length) * (20 * self.buffer + age)
            for length, age in zip(lengths, ages, strict=True)
        ]
        room = self.capacity - sum(lengths[i] for i in first)
        others = [i for i in range(len(lengths)) if i not in first]
        picked = [others[i] for i in best_subset([lengths[i] for i in others], [values[i] for i in others], room)]
        if self.max_samples is not None:
            picked = sorted(picked, key=lambda i: -lengths[i])[: self.max_samples - len(first)]
        chosen = {*first, *picked}
        pack = [self._held[i] for i in sorted(chosen, key=lambda i: (lengths[i], i))]
        self._held = [replace(e, age=e.age + 1) for i, e in enumerate(self._held) if i not in chosen]
        self._tokens -= sum(lengths[i] for i in chosen)
        return pack

    def held(self) -> list[Entry]:
        """The held samples, in the order they came; their places and ages are the whole state."""
        return list(self._held)


def best_subset(lengths: Sequence[int], values: Sequence[int], capacity: int) -> list[int]:
    """The indices of the items of highest total value whose lengths sum up to at most ``capacity``.

    Worked example: ``best_subset([6, 5, 4], [6, 5, 4], 9) == [2, 1]``.

    Args:
        lengths: positive item lengths.
        values: positive item values; their sum must stay below 2**63. Of equal totals the one of earlier items wins.
        capacity: the highest sum of lengths; not negative.
    """
    best_C = np.zeros(capacity + 1, dtype=np.int64)
    is_better = np.zeros((len(lengths), capacity + 1), dtype=np.bool_)
    for i, (length, value) in enumerate(zip(lengths, values, strict=True)):
        if length <= capacity:
            with_item = best_C[: capacity + 1 - length] + value
            np.greater(with_item, best_C[length:], out=is_better[i, length:])
            np.maximum(best_C[length:], with_item, out=best_C[length:])
    chosen = []
    for i in range(len(lengths) - 1, -1, -1):
        if is_better[i, capacity]:
            chosen.append(i)
            capacity -= lengths[i]
    return chosen


def pack_all(plans: Iterable[Plan], packer: Packer) -> Iterator[list[Plan]]:
    """Every plan, packed; for measuring a packer or packing a finite list.

    Raises:
        SampleError: if a plan is longer than a pack.
    """
    for position, plan in enumerate(plans):
        packer.add(Entry((0, position), plan))
        if packer.is_full:
            yield [entry.plan for entry in packer.take()]
    while pack := packer.take():
        yield [entry.plan for entry in pack]
