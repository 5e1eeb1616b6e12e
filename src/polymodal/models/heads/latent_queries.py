"""Heads that ask a latent backbone with learned queries.

Legend: ``S`` samples, ``L`` latents, ``D`` their width, ``Q`` queries, ``W`` their width, ``C`` classes, ``V``
vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.latent import LatentBlock
from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers.transformer import initialise


class QueryClassHead(nn.Module):
    """One learned query looks at the latents, and what it sees is classified.

    Source: Perceiver IO, arXiv 2107.14795, section 3.2 and table 1.

    Args:
        width: of the latents, and of the query.
        classes: ``C``.
        heads: of its attention.
    """

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.look = LatentBlock(width, width, (width, width), heads, 1)
        self.out = nn.Linear(width, classes)
        initialise(self, 1)

    def forward(self, z_SLD: Tensor) -> Tensor:
        """Latents ``[S, L, D]`` to logits ``[S, C]``."""
        seen_S1D = self.look(self.query.expand(len(z_SLD), -1, -1), z_SLD)
        logits: Tensor = self.out(seen_S1D[:, 0])
        return logits


class QueryTokenConfig(HeadConfig):
    """One learned query for every place of a text, whose token it answers with (masked or not).

    Source: Perceiver IO, arXiv 2107.14795, section 4.1: the vocabulary matrix is the stream's token embedding.
    """

    use: Literal["query_token"] = "query_token"
    stream: str
    """The text stream, whose encoder has a table of tokens and a largest length."""
    qk_width: int = Field(default=256, ge=1)
    """Width of queries and keys."""
    heads: int = Field(default=8, ge=1)

    def build(self, inputs: HeadInputs) -> QueryTokenHead:
        """The head; needs a latent backbone and a text stream with a token embedding."""
        embedding = inputs.token_embeddings.get(self.stream)
        places = getattr(inputs.stream_encoders.get(self.stream), "max_tokens", None)
        if embedding is None or places is None:
            raise ConfigError(
                f"head {self.use}: stream {self.stream!r} has no table of tokens; expected one of "
                f"{sorted(inputs.token_embeddings)}"
            )
        if self.qk_width % self.heads or embedding.embedding_dim % self.heads:
            raise ConfigError(
                f"head {self.use}: heads {self.heads} divide neither qk_width {self.qk_width} nor the width "
                f"{embedding.embedding_dim} of the stream, or only one of them"
            )
        return QueryTokenHead(self, self._width(inputs), embedding, places)


class QueryTokenHead(nn.Module):
    """See :class:`QueryTokenConfig`."""

    def __init__(self, config: QueryTokenConfig, latent_width: int, embedding: nn.Embedding, places: int) -> None:
        super().__init__()
        self.config = config
        width = embedding.embedding_dim
        self.queries = nn.Parameter(torch.randn(places, width) * width**-0.5)
        self.look = LatentBlock(width, latent_width, (config.qk_width, width), config.heads, 1, residual=False)
        initialise(self, 1)
        self.embedding = embedding
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))

    def forward(self, z_SLD: Tensor) -> Tensor:
        """Latents ``[S, L, D]`` to logits ``[S, Q, V]`` of every place."""
        seen_SQW = self.look(self.queries.expand(len(z_SLD), -1, -1), z_SLD)
        logits: Tensor = seen_SQW @ self.embedding.weight.T + self.bias
        return logits
