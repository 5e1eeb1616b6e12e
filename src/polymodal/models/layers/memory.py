"""What cross-attention looks at, and which of it each token may see.

Legend: ``B`` rows, ``T`` tokens, ``M`` features of a memory, ``C`` their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Memory:
    """What cross-attention looks at; made once per forward pass and shared by every layer.

    Worked example, one sample ``image a, "x", image b, "y"`` whose images give two features each, seen by the latest
    image: row of the mask for ``x``: ``[1 1 0 0]``, for ``y``: ``[0 0 1 1]``; ``next_BM`` is that of ``y``.

    Args:
        x_BMC: features; for a packed layout, ``B`` is the number of segments and row s belongs to segment s.
        is_valid_BM: bool, False on padding; None if there is none. A row without a valid feature gives zeros.
        may_attend_BTM: bool, which features each token sees, where not every token sees every valid one; for a packed
            layout ``[1, T, M]``, each token against the row of its own segment. Only valid features may be True. A
            token that sees none receives zeros.
        next_BM: bool, which features the tokens that follow will see; None: the valid ones.
    """

    x_BMC: Tensor
    is_valid_BM: Tensor | None = None
    may_attend_BTM: Tensor | None = None
    next_BM: Tensor | None = None

    @cached_property
    def is_empty(self) -> bool:
        """Whether no row has anything to see."""
        return self.is_valid_BM is not None and not bool(self.is_valid_BM.any())

    @cached_property
    def mask(self) -> tuple[Tensor | None, Tensor | None]:
        """``(may_attend, sees_any)``: ``[B, T or 1, M]`` and ``[B, T or 1]``, each None where all is True.

        A token that sees nothing may attend everywhere, so that no row of a softmax is empty; ``sees_any`` then takes
        its result away.
        """
        if self.may_attend_BTM is not None:
            may_attend = self.may_attend_BTM
        elif self.is_valid_BM is None or bool(self.is_valid_BM.all()):
            return None, None
        else:
            may_attend = self.is_valid_BM[:, None]
        sees_any = may_attend.any(dim=-1)
        if bool(sees_any.all()):
            return may_attend, None
        return may_attend | ~sees_any[..., None], sees_any

    def following(self) -> Memory:
        """The memory as the tokens after the last one see it."""
        if self.next_BM is None and self.may_attend_BTM is None:
            return self
        return Memory(self.x_BMC, self.next_BM if self.next_BM is not None else self.is_valid_BM)

    def select(self, rows_B: Tensor) -> Memory:
        """The given rows, of a memory without a mask per token."""
        return Memory(
            self.x_BMC[rows_B],
            None if self.is_valid_BM is None else self.is_valid_BM[rows_B],
            None,
            None if self.next_BM is None else self.next_BM[rows_B],
        )


def empty_memory(rows: int, width: int, like: Tensor) -> Memory:
    """A memory of rows that have nothing to see."""
    x_BMC = like.new_zeros(rows, 1, width)
    return Memory(x_BMC, torch.zeros(rows, 1, dtype=torch.bool, device=like.device))
