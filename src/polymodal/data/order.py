"""Shuffle by cipher: a seeded permutation of any number of samples that is computed, never stored.

Resuming at position 10**12 costs the same as starting at 0: the whole state is (seed, epoch, position).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Permutation:
    """A bijection of ``0 .. length - 1`` keyed by (seed, epoch): position in the epoch -> index of the sample.

    The index is written as (left, right) on a grid of ``rows x columns`` that holds just over ``length`` cells; each
    round adds a keyed hash of one half to the other, modulo its size, which can always be undone. Results outside
    ``0 .. length - 1`` are enciphered again until they fall inside (cycle walking), which keeps the map a bijection.

    Worked example: ``[Permutation(5, seed=0)(i) for i in range(5)]`` holds each of 0..4 once.

    Args:
        length: how many samples there are; at least 1, below 2**62.
        seed: any integer or string; different seeds give unrelated orders.
        epoch: counts the passes over the samples; each has its own order.

    Raises:
        ValueError: if ``length`` is out of range.

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, sections 3 and 4 (generalised
    Feistel, cycle walking). Deviation: six rounds of a 64-bit mixing hash (splitmix64); made to shuffle, not to hide.
    """

    def __init__(self, length: int, seed: int | str = 0, epoch: int = 0) -> None:
        if not 1 <= length < 1 << 62:
            raise ValueError(f"found length {length:,}, expected at least 1 and below 2**62 samples to shuffle")
        self.length = length
        self._rows = math.isqrt(length - 1) + 1
        self._columns = -(-length // self._rows)
        key = hashlib.blake2b(f"{seed}/{epoch}/{length}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(key[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.length

    def __call__(self, position: int) -> int:
        """The index at one position.

        Raises:
            IndexError: if the position is outside ``0 .. length - 1``.
        """
        if not 0 <= position < self.length:
            raise IndexError(f"found position {position}, expected 0 to {self.length - 1}")
        while (position := self._encipher(position)) >= self.length:
            pass
        return position

    def many(self, positions: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """The indices at many positions: ``[N]`` integers -> ``[N]`` int64, equal to calling one by one.

        Raises:
            IndexError: if a position is outside ``0 .. length - 1``.
        """
        result = positions.astype(np.int64)
        if result.size and not (int(result.min()) >= 0 and int(result.max()) < self.length):
            raise IndexError(f"found a position outside 0 to {self.length - 1}")
        walking = np.arange(len(result))
        while walking.size:
            result[walking] = self._encipher_many(result[walking].astype(np.uint64)).astype(np.int64)
            walking = walking[result[walking] >= self.length]
        return result

    def _encipher(self, value: int) -> int:
        left, right = divmod(value, self._columns)
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _mix(left, key) % self._columns) % self._columns
            else:
                left = (left + _mix(right, key) % self._rows) % self._rows
        return left * self._columns + right

    def _encipher_many(self, values_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left, right = values_N // columns, values_N % columns
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _mix_many(left, key) % columns) % columns
            else:
                left = (left + _mix_many(right, key) % rows) % rows
        return left * columns + right


def _mix(value: int, key: int) -> int:
    value = (value + key) * _GOLDEN & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _mix_many(values_N: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    values_N = (values_N + np.uint64(key)) * np.uint64(_GOLDEN)
    values_N = (values_N ^ values_N >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values_N = (values_N ^ values_N >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values_N ^ values_N >> np.uint64(31)
