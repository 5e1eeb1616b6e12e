"""Passes: what of a model must run for an objective.

Most passes are a name. A :class:`TokenPass` also says what is hidden, so that two objectives that hide the same share
one run. Objectives ask for passes and models run them, and neither imports the other: this is what both know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TokenPass:
    """A run whose states at some places are read by a ``masked_token`` head.

    Args:
        kind: ``masked``: places are hidden and predicted. ``caption``: the tokens of the head's stream see what stands
            before them alone, and each predicts the next.
        head: name of the head; "" stands for the only one that fits.
        mask: per stream, the share of its places that is hidden; for ``masked`` alone.
    """

    kind: Literal["masked", "caption"]
    head: str = ""
    mask: tuple[tuple[str, float], ...] = ()

    @property
    def run(self) -> TokenPass:
        """The run behind it: passes that differ in their head alone share it."""
        return TokenPass(self.kind, "" if self.kind == "masked" else self.head, self.mask)


Pass = str | TokenPass
"""``sequence``, ``embed``, ``merge``, ``match``, ``match_any``, ``match_hard``, or a :class:`TokenPass`."""


def kind_of(needed: Pass) -> str:
    """The kind of a pass, by which a model says what it can run."""
    return needed if isinstance(needed, str) else needed.kind
