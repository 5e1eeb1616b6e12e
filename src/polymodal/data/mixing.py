"""Which source the next sample comes from: exact weights, no random draws, position counters as the only state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from polymodal.core.errors import ConfigError, DataError


class Mix:
    """An endless weighted mix of sources.

    After ``k`` draws every source has been drawn its share of ``k``, rounded up or down, never further off. Draw ``j``
    of a source with share ``w`` may happen from step ``j / w`` on and is due at step ``(j + 1) / w``; of the draws that
    may happen, the one that is due first does (ties: the lower source). All of it in exact integers.

    Worked example: weights 2 and 1 give the sources ``0 0 1 | 0 0 1 | ...``.

    Args:
        weights: one positive finite number per source; only ratios matter. Decimals are taken as written (0.1 is 1/10).

    Raises:
        ConfigError: if a weight is zero, negative or not finite, or there are none.

    Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980); here as earliest deadline first.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"found the weight {weight}, expected a positive number; leave unused sources out")
        if not weights:
            raise ConfigError("found no sources to mix, expected at least one")
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        self._weights = [weight // math.gcd(*whole) for weight in whole]
        self._total = sum(self._weights)
        self.counts = [0] * len(self._weights)
        """How many samples each source has given; the whole state."""

    def shares(self) -> list[int]:
        """The weights as the smallest integers of the same ratios."""
        return list(self._weights)

    def draw(self) -> tuple[int, int]:
        """The next (source, position in that source); positions of a source count up from 0 and never end."""
        step = sum(self.counts)
        best, best_due = -1, 0
        for source, (weight, count) in enumerate(zip(self._weights, self.counts, strict=True)):
            if count * self._total // weight > step:
                continue
            due = -(-(count + 1) * self._total // weight)
            if best < 0 or due < best_due:
                best, best_due = source, due
        position = self.counts[best]
        self.counts[best] += 1
        return best, position


class InTurn:
    """One pass over every source, one source after the other, in order.

    Args:
        lengths: the number of samples of each source.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)
        self.counts = [0] * len(self._lengths)
        """How many samples each source has given; the whole state."""

    def shares(self) -> list[int]:
        """The lengths: one pass takes everything."""
        return list(self._lengths)

    def draw(self) -> tuple[int, int] | None:
        """The next (source, position in that source); None after the last."""
        for source, length in enumerate(self._lengths):
            if self.counts[source] < length:
                self.counts[source] += 1
                return source, self.counts[source] - 1
        return None


def restore_counts(mix: Mix | InTurn, counts: Sequence[int]) -> None:
    """Continue a mix where its ``counts`` were saved.

    Raises:
        DataError: if they are not one non-negative integer per source.
    """
    if len(counts) != len(mix.counts) or any(not isinstance(count, int) or count < 0 for count in counts):
        raise DataError(
            f"the saved mix position is {list(counts)!r:.80}, expected {len(mix.counts)} counts of samples; "
            "the state belongs to another run"
        )
    mix.counts = list(counts)
