"""Dropping media tokens that are looked at least, in the middle of a decoder.

Legend: ``B`` rows, ``T`` tokens, ``H`` heads, ``G`` key-value heads, ``K`` width of a head.

Source: FastV, arXiv 2403.06764, section 4.1, and its published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from polymodal.core.config import Config


class MediaDrop(Config):
    """Which share of the media tokens a decoder goes on without, and from where on; for inference.

    Worked example, ``{after: 2, share: 0.5}``: the first two blocks read everything; of each prompt the half of the
    media tokens that the second block's attention reached least is dropped, and the other blocks read the rest.
    """

    after: PositiveInt
    """Blocks that see all tokens (K of the paper); the attention of the last of them decides."""
    share: float = Field(ge=0.0, lt=1.0)
    """Of the media tokens of each prompt, dropped (R of the paper); what is not a whole token stays."""
    by: Literal["mean", "last"] = "mean"
    """Whose attention decides, averaged over the heads: the ``mean`` over all tokens that may look (the paper's text),
    or that of the prompt's ``last`` token (the published code)."""

    def count(self, num_media: int) -> int:
        """How many of so many media tokens are dropped."""
        return int(self.share * num_media + 1e-9)


@dataclass(frozen=True, eq=False)
class Dropping:
    """What a forward pass may drop.

    Args:
        config: where and how much.
        is_media_BT: bool, the tokens that may go.
        last_B: int64, the place of each prompt's last token.
    """

    config: MediaDrop
    is_media_BT: Tensor
    last_B: Tensor

    @property
    def is_any(self) -> bool:
        """Whether any row loses a token."""
        return bool(self.config.count(int(self.is_media_BT.sum(1).amax())))

    def received(self, q_BHTK: Tensor, k_BGTK: Tensor, scale: float | None) -> Tensor:
        """The attention that each token receives, ``[B, T]`` float32, from causal queries and keys."""
        heads, tokens, head_dim = q_BHTK.shape[1:]
        keys_BHTK = k_BGTK.float().repeat_interleave(heads // k_BGTK.shape[1], dim=1)
        places_T = torch.arange(tokens, device=q_BHTK.device)
        if self.config.by == "last":
            rows = torch.arange(len(q_BHTK), device=q_BHTK.device)
            queries, places = q_BHTK[rows, :, self.last_B][:, :, None], self.last_B[:, None]
        else:
            queries, places = q_BHTK, places_T[None]
        scores = queries.float() @ keys_BHTK.transpose(2, 3) * (head_dim**-0.5 if scale is None else scale)
        is_later = places_T > places[..., None]
        attention = scores.masked_fill(is_later[:, None], -torch.inf).softmax(-1).mean(1)
        is_asked = (places <= self.last_B[:, None])[..., None]
        return (attention * is_asked).sum(1) / is_asked.sum(1)

    def keeps(self, received_BT: Tensor) -> Tensor:
        """Which tokens stay, bool ``[B, T]``: all that are no media, and of media the most looked at."""
        is_kept = torch.ones_like(self.is_media_BT)
        for row, is_media_T in enumerate(self.is_media_BT):
            places = is_media_T.nonzero().squeeze(1)
            # Of equally looked at ones the first stay.
            order = received_BT[row, places].argsort(descending=True, stable=True)
            is_kept[row, places[order[len(places) - self.config.count(len(places)) :]]] = False
        return is_kept


class Watch:
    """Takes the attention that tokens receive from the block that it is given to."""

    def __init__(self, dropping: Dropping) -> None:
        self.dropping = dropping
        self.received_BT: Tensor | None = None

    def see(self, q_BHTK: Tensor, k_BGTK: Tensor, scale: float | None) -> None:
        """Remember; called by the block's self-attention."""
        self.received_BT = self.dropping.received(q_BHTK, k_BGTK, scale)


def prefill_cost(tokens: int, width: int, inner: int, outer: int, mlp: int) -> int:
    """Multiplications of one block over so many tokens.

    FastV, section 4.1, has ``4 n d^2 + 2 n^2 d + 2 n d m``; shared key-value heads make the first term smaller, a gated
    MLP the last one larger.

    Args:
        tokens: ``n``.
        width: ``d``.
        inner: joined width of the query heads.
        outer: joined width of the key-value heads.
        mlp: hidden width of the MLP times the number of its projections.
    """
    return 2 * tokens * width * (inner + outer) + 2 * tokens**2 * inner + tokens * width * mlp
