"""How the tokens of a batch stand: padded rows, or samples packed one after another in one row.

Legend: ``B`` rows, ``T`` tokens of a row, ``S`` segments. Masks: True means *may attend* or *is valid*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.layers.dropping import Dropping

_MAX_WASTE = 1.125
"""A bucket may hold so many times its own tokens: a little padding costs less than many small attention calls."""
_MIN_PADDING = 0.1
"""The share of padding from which on taking it out costs less than computing it."""


class Buckets(NamedTuple):
    """Packed segments as batched attention calls.

    Args:
        shapes: ``(segments, length)`` of each call, in order.
        gather: place of each padded token in the row, or None where nothing is padded.
        inverse: place of each token of the row among the padded ones.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: Tensor | None
    inverse: Tensor | None


def _similar(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Neighbouring segments joined while the padding to the longest of them stays small."""
    shapes: list[tuple[int, int]] = []
    count, longest, total = 0, 0, 0
    for length in lengths:
        if count and (count + 1) * max(longest, length) > _MAX_WASTE * (total + length):
            shapes.append((count, longest))
            count, longest, total = 0, 0, 0
        count, longest, total = count + 1, max(longest, length), total + length
    return (*shapes, (count, longest)) if count else ()


@dataclass(frozen=True, eq=False)
class Layout:
    """Who may attend to whom, and the position of each token.

    Make it once per batch: its mask is built on first use and shared by every layer.

    Worked example, causal, two samples of 2 and 1 tokens. Padded, rows are queries::

        row 0: 1 0    row 1: 1 .      (right padding needs no mask: no valid token looks to the right)
               1 1           . .

    Packed, ``segment_lengths = (2, 1)``; no mask of the whole row ever exists, each segment is its own attention::

        1 0 .
        1 1 .
        . . 1

    Args:
        causal: whether a token sees only itself and what comes before it.
        is_valid_BT: bool, False on padding; None if there is none. Outputs at padding are finite and meaningless.
        segment_lengths: tokens of each packed segment in order (then ``B == 1``); None for padded rows.
        positions_BT: int64 positions for rotary codes; None counts 0, 1, ... within each row or segment. With a cache
            the cache counts, and these are not read.
        source_lengths: for an encoder-decoder, how many tokens at the beginning of each row or segment its encoder
            reads; None for all others.
    """

    causal: bool
    is_valid_BT: Tensor | None = None
    segment_lengths: tuple[int, ...] | None = None
    positions_BT: Tensor | None = None
    is_causal_T: Tensor | None = None
    """Bool, for rows that are neither causal nor bidirectional: see :meth:`prefixed`."""
    source_lengths: tuple[int, ...] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    """Cosines and sines ``[1, T, 1, K]`` of a rotary code that the caller made (``rope_2d``); None: the stack's."""
    dropping: Dropping | None = None
    """Which tokens a stack may go on without; None: none."""

    @classmethod
    def prefixed(cls, is_valid_BT: Tensor, is_causal_T: Tensor) -> Layout:
        """Rows with a prefix in which all see each other, and causal tokens that see it and what stands before them.

        Worked example, causal tokens ``[0 1 1]``, rows are queries (Dong 1905.03197, section 2.3)::

            1 0 0
            1 1 0
            1 1 1

        Args:
            is_valid_BT: bool, False on padding.
            is_causal_T: bool, which tokens are causal; they need not stand last.
        """
        return cls(False, is_valid_BT, is_causal_T=is_causal_T)

    @classmethod
    def padded(cls, is_valid_BT: Tensor | None, causal: bool, positions_BT: Tensor | None = None) -> Layout:
        """Rows with padding anywhere; a mask without padding costs nothing, it is dropped."""
        if is_valid_BT is not None and bool(is_valid_BT.all()):
            is_valid_BT = None
        return cls(causal, is_valid_BT, None, positions_BT)

    @classmethod
    def packed(cls, segment_lengths: Sequence[int], causal: bool, positions_BT: Tensor | None = None) -> Layout:
        """One row of segments that do not see each other.

        Raises:
            ConfigError: if a segment is empty.
        """
        lengths = tuple(int(length) for length in segment_lengths)
        if not lengths or min(lengths) < 1:
            raise ConfigError(f"packed layout: found segment lengths {lengths}, expected at least one, each above 0")
        return cls(causal, None, lengths, positions_BT)

    def check(self, rows: int, tokens: int) -> None:
        """Prove that the layout belongs to a ``[rows, tokens]`` input.

        Raises:
            ConfigError: if it does not.
        """
        if self.segment_lengths is not None and (rows, sum(self.segment_lengths)) != (1, tokens):
            raise ConfigError(
                f"packed layout of {sum(self.segment_lengths)} tokens: found an input of {rows} rows and {tokens} "
                "tokens, expected 1 row and as many tokens as the segments have"
            )
        if self.is_valid_BT is not None and tuple(self.is_valid_BT.shape) != (rows, tokens):
            raise ConfigError(
                f"padded layout: found is_valid of shape {tuple(self.is_valid_BT.shape)}, expected ({rows}, {tokens})"
            )

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """The int64 positions, ``[B, T]`` or ``[1, T]`` where all rows count alike."""
        if self.positions_BT is not None:
            return self.positions_BT
        if self.segment_lengths is None:
            return torch.arange(tokens, device=device)[None]
        parts = [torch.arange(length, device=device) for length in self.segment_lengths]
        return torch.cat(parts)[None]

    def without_padding(self) -> tuple[Layout, Tensor] | None:
        """The valid tokens alone, packed, rows in order of length so that neighbours share attention calls.

        Worked example, rows ``[a b . .]`` and ``[c . . .]``: segments ``c`` and ``a b``, index ``[4 0 1]``.

        Returns:
            The packed layout, and the place ``[N]`` of each of its tokens in the flattened rows; None if little would
            be gained, or the layout is bidirectional (there, only segments of equal length share a call).
        """
        if self.is_valid_BT is None or not self.causal:
            return None
        rows, tokens = self.is_valid_BT.shape
        lengths: list[int] = self.is_valid_BT.sum(dim=1).tolist()
        if not 0 < sum(lengths) <= (1 - _MIN_PADDING) * rows * tokens:
            return None
        device = self.is_valid_BT.device
        order = torch.tensor(sorted(range(rows), key=lambda row: lengths[row]), device=device)
        index_N = (order[:, None] * tokens + torch.arange(tokens, device=device))[self.is_valid_BT[order]]
        positions_BT = self.positions(tokens, device).expand(rows, tokens)
        kept = sorted(length for length in lengths if length)
        return Layout.packed(kept, True, positions_BT.flatten()[index_N][None]), index_N

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Runs of equal-length segments as ``(count, length)``; each run is one batched attention call."""
        return tuple((len(list(run)), length) for length, run in groupby(self.segment_lengths or ()))

    @cached_property
    def buckets(self) -> Buckets:
        """How packed causal attention is batched: neighbours of similar length share one call.

        A shorter segment of a bucket is completed on the right by copies of its last token; causal attention never
        looks to the right, so no mask is needed and nothing leaks. Segments of a bidirectional layout share a call
        only if they are equally long.

        Worked example, lengths ``(3, 2)`` causal: one call of 2 x 3, gather ``[0 1 2 3 4 4]``, inverse ``[0 1 2 3 4]``.
        """
        lengths = self.segment_lengths or ()
        if not self.causal:
            return Buckets(self.groups, None, None)
        shapes = _similar(lengths)
        if sum(count * longest for count, longest in shapes) == sum(lengths):
            return Buckets(shapes, None, None)
        index, inverse, start, padded, segment = [], [], 0, 0, 0
        for count, longest in shapes:
            for length in lengths[segment : segment + count]:
                place = torch.arange(longest)
                index.append(start + place.clamp(max=length - 1))
                inverse.append(padded + place[:length])
                start, padded = start + length, padded + longest
            segment += count
        device = self.positions_BT.device if self.positions_BT is not None else None
        return Buckets(shapes, torch.cat(index).to(device), torch.cat(inverse).to(device))

    @cached_property
    def mask(self) -> Tensor | None:
        """``may_attend``, broadcastable to ``[B, 1, T, T]``; None where the causal flag alone is enough.

        A padding token may attend to itself, so that no row of a softmax is empty.
        """
        if self.is_valid_BT is None:
            return None
        if self.is_causal_T is not None:
            tokens = len(self.is_causal_T)
            before_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=self.is_causal_T.device).tril()
            may_attend_TT = ~self.is_causal_T | (self.is_causal_T[:, None] & before_TT)
            own_TT = torch.eye(tokens, dtype=torch.bool, device=self.is_causal_T.device)
            return ((may_attend_TT & self.is_valid_BT[:, None, :]) | own_TT)[:, None]
        if not self.causal:
            # A row without any valid token attends everywhere: finite, and never read.
            has_none_B1 = ~self.is_valid_BT.any(dim=1, keepdim=True)
            return (self.is_valid_BT | has_none_B1)[:, None, None]
        if bool((self.is_valid_BT[:, 1:] <= self.is_valid_BT[:, :-1]).all()):
            return None
        tokens = self.is_valid_BT.shape[1]
        square = torch.ones(tokens, tokens, dtype=torch.bool, device=self.is_valid_BT.device)
        may_attend = square.tril() & self.is_valid_BT[:, None, :]
        return (may_attend | torch.eye(tokens, dtype=torch.bool, device=square.device))[:, None]
