"""The head of language models: states -> what comes next.

Shape legend: ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers import Activation, initialise
from polymodal.models.layers.mlp import activate


class NextTokenConfig(HeadConfig):
    """Logits over the vocabulary; ``tied`` shares the matrix with the token embedding (Press 1608.05859)."""

    use: Literal["next_token"] = "next_token"
    tied: bool = True
    """Whether its matrix is the token embedding's."""
    bias: bool = False
    """Whether every token has a bias."""
    transform: bool = False
    """Whether a linear map, an activation and a norm come first (BERT and decoders made of it)."""
    activation: Activation = "gelu"
    """Of the transform."""
    norm_eps: float = Field(default=1e-12, gt=0)
    """Of the transform."""
    scale: float | None = Field(default=None, gt=0)
    """What states are multiplied by before the matrix (T5: ``width ** -0.5``); None: nothing."""
    suppress: tuple[NonNegativeInt, ...] = ()
    """Ids that are never generated (Whisper: marks that are no speech)."""
    suppress_first: tuple[NonNegativeInt, ...] = ()
    """Ids that are not generated as the first of an answer."""

    @model_validator(mode="after")
    def _transform_is_asked_for(self) -> Self:
        default = type(self).model_fields
        for name in ("activation", "norm_eps"):
            if not self.transform and getattr(self, name) != default[name].default:
                raise ValueError(f"{name!r} belongs to transform: true")
        return self

    def build(self, inputs: HeadInputs) -> nn.Module:
        """The head; needs a decoder backbone."""
        if inputs.own_head is not None:
            if self != NextTokenConfig(suppress=self.suppress, suppress_first=self.suppress_first):
                raise ConfigError(
                    "head next_token: found tied, bias, transform or scale set, but the backbone brings its own head "
                    "with its own tying; leave them out"
                )
            return inputs.own_head
        if inputs.embedding is None:
            raise ConfigError("head next_token: needs a decoder backbone, whose token states it reads")
        return NextTokenHead(self, inputs.embedding, inputs.added_embedding)


class NextTokenHead(nn.Module):
    """States ``[..., D]`` -> logits ``[..., V]``.

    Args:
        config: the head.
        embedding: the token embedding; says both widths, and is shared where ``tied``.
        added: rows of it that stand apart, whose logits follow the others.
    """

    def __init__(self, config: NextTokenConfig, embedding: nn.Embedding, added: nn.Embedding | None = None) -> None:
        super().__init__()
        self.config = config
        width = embedding.embedding_dim
        self.dense = nn.Linear(width, width) if config.transform else None
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.transform else None
        self.proj = nn.Linear(width, embedding.num_embeddings, bias=config.bias)
        self.added = None if added is None else nn.Linear(width, added.num_embeddings, bias=config.bias)
        initialise(self, 1)
        for proj, rows in ((self.proj, embedding), (self.added, added)):
            if proj is None or rows is None:
                continue
            nn.init.normal_(proj.weight, std=width**-0.5)
            if config.tied:
                proj.weight = rows.weight

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[..., V]``."""
        if self.dense is not None and self.norm is not None:
            states = self.norm(activate(self.dense(states), self.config.activation))
        if self.config.scale is not None:
            states = states * self.config.scale
        logits: Tensor = self.proj(states)
        return logits if self.added is None else torch.cat((logits, self.added(states)), dim=-1)
