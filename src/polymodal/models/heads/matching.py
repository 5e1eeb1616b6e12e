"""Do the parts of a sample belong together? Legend: ``S`` samples, ``M`` queries, ``D`` width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers import initialise


class MatchingConfig(HeadConfig):
    """The logit of a sample whose parts belong together (ALBEF, arXiv 2107.07651, section 3.2)."""

    use: Literal["matching"] = "matching"
    outputs: Literal[1, 2] = 1
    """One logit, or two of which the second says yes (ALBEF, BLIP, ViLT, FLAVA): what counts is their difference."""
    at: Literal["backbone", "queries"] = "backbone"
    """Which states are read: the backbone's of a sample, or those of a Q-Former's queries with the text beside them,
    whose logits are averaged (BLIP-2, arXiv 2301.12597, section 3.2)."""
    pooler: bool = False
    """Whether the state first goes through a linear map and tanh of the head's own (FLAVA)."""

    def build(self, inputs: HeadInputs) -> nn.Module:
        """``[S, D] -> [S, 1]``, or ``[S, M, D] -> [S, M, 1]`` of each query."""
        width = self._query_width(inputs) if self.at == "queries" else self._width(inputs)
        if self.outputs == 1 and not self.pooler:
            return nn.Linear(width, 1)
        return MatchingHead(width, self.outputs, self.pooler)


class MatchingHead(nn.Module):
    """See :class:`MatchingConfig`."""

    def __init__(self, width: int, outputs: int, pooler: bool) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width) if pooler else None
        self.proj = nn.Linear(width, outputs)
        initialise(self, 1)

    def scores(self, states_SD: Tensor) -> Tensor:
        """All outputs ``[..., 1 or 2]``, as the published heads give them."""
        if self.pooler is not None:
            states_SD = torch.tanh(self.pooler(states_SD))
        out: Tensor = self.proj(states_SD)
        return out

    def forward(self, states_SD: Tensor) -> Tensor:
        """The logit ``[..., 1]``."""
        scores = self.scores(states_SD)
        return scores if scores.shape[-1] == 1 else scores[..., 1:] - scores[..., :1]
