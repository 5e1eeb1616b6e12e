"""A text of an encoder backbone, written token by token: what stands beside it is read once, and so is each token.

Legend: ``S`` samples, ``T`` tokens written so far, ``W`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymodal.models.compose.joint import JointRun, Tokens
from polymodal.models.heads.masked_token import MaskedTokenHead
from polymodal.models.layers.cache import KVCache


class WritingRun:
    """Texts of one length that grow by a token at a time.

    Keys and values are kept, unless the backbone cannot keep them or some sample of the batch lacks some of the others'
    tokens; then every step reads everything again, with the same result within rounding.

    Args:
        run: of the batch.
        head: from :func:`polymodal.models.compose.joint.caption_head`.
        tokens: of the other streams, from :meth:`JointRun.lay_out`; none of them: the words alone.
        is_valid: likewise.
        size: ``(S, T)`` at the end.
    """

    def __init__(
        self, run: JointRun, head: MaskedTokenHead, tokens: Tokens, is_valid: Tokens, size: tuple[int, int]
    ) -> None:
        self.run, self.head, self.tokens, self.is_valid = run, head, dict(tokens), dict(is_valid)
        self.cache: KVCache | None = None
        if run.backbone.can_write and all(bool(valid.all()) for valid in is_valid.values()):
            beside = sum(tokens[name].shape[1] for name in run.model.config.sequence_streams if name in tokens)
            self.cache = run.backbone.new_cache(size[0], beside + size[1])

    def logits(self, ids_ST: Tensor) -> Tensor:
        """What follows texts, ``[S, V]``; each call's texts are the last one's and one token more."""
        if self.cache is None:
            return self.run.next_token_logits(self.head, ids_ST, self.tokens, self.is_valid)
        x_STW = self.run.text_tokens(self.head, ids_ST)[0]
        name = self.head.config.stream
        if self.cache.length == 0:
            own = {n: x for n, x in self.tokens.items() if n in self.run.model.config.sequence_streams}
            states = self.run.backbone.write(name, x_STW, self.cache, own, self.run.memory(self.tokens, self.is_valid))
        else:
            states = self.run.backbone.write(name, x_STW[:, -1:], self.cache)
        logits_SV: Any = self.head(states[:, -1])
        return torch.as_tensor(logits_SV)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.tokens = {name: x[rows] for name, x in self.tokens.items()}
        self.is_valid = {name: valid[rows] for name, valid in self.is_valid.items()}
        if self.cache is not None:
            self.cache.select(rows)
