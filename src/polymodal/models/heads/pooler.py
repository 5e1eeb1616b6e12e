"""A linear map and tanh of one vector (BERT's pooler). Legend: ``I`` items or samples, ``D`` width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers import initialise


class PoolerConfig(HeadConfig):
    """BERT's pooler beside what else reads the same vector (arXiv 1810.04805; FLAVA has one per encoder)."""

    use: Literal["pooler"] = "pooler"
    stream: str | None = None
    """The stream whose pooled vector is read; None: the backbone's state of each sample."""

    def build(self, inputs: HeadInputs) -> Pooler:
        """``[I, D] -> [I, D]``."""
        return Pooler(self._width(inputs) if self.stream is None else self._stream_width(self.stream, inputs))


class Pooler(nn.Module):
    """See :class:`PoolerConfig`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)
        initialise(self, 1)

    def forward(self, x_ID: Tensor) -> Tensor:
        """Values in -1..1, ``[I, D]``."""
        return torch.tanh(self.proj(x_ID))
