"""The querying transformer. Legend: ``U`` units, ``N`` features, ``M`` queries, ``D`` width."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.models.connectors.base import Connector, ConnectorConfig, fixed_tokens
from polymodal.models.connectors.projections import MLPStack
from polymodal.models.layers import Layout, Memory, Transformer, TransformerConfig


class QFormerConfig(ConnectorConfig):
    """Learned queries that attend to each other and, in every n-th block, to the features.

    Source: BLIP-2, arXiv 2301.12597, section 3.1: BERT's blocks (norms after the residual sums), queries only (its text
    path and text objectives are not part of the connector).
    """

    use: Literal["qformer"] = "qformer"
    queries: int = Field(default=32, ge=1)
    """Queries, and so tokens, of a unit."""
    width: int = Field(default=128, ge=1)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp_dim: int | None = Field(default=None, ge=1)
    """Hidden width of the MLPs; None: 4 x width."""
    cross_every: int = Field(default=2, ge=1)
    """Blocks 0, n, 2n, ... attend to the features."""
    norm_eps: float = Field(default=1e-12, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def stack(self, in_dim: int) -> TransformerConfig:
        """The transformer's config, over features of ``in_dim``."""
        return TransformerConfig.parse(
            {
                "width": self.width,
                "depth": self.depth,
                "heads": self.heads,
                "mlp_dim": self.mlp_dim,
                "norm_eps": self.norm_eps,
                "dropout": self.dropout,
                "pre_norm": False,
                "final_norm": False,
                "cross_width": in_dim,
                "cross_every": self.cross_every,
            }
        )

    @model_validator(mode="after")
    def _stack_is_possible(self) -> Self:
        self.stack(1)
        return self

    def num_tokens(self, num_features: int) -> int:
        """As many as queries; none without features."""
        return self.queries if num_features else 0

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module."""
        return QFormer(self, in_dim, out_dim)


class QFormer(Connector):
    """See :class:`QFormerConfig`."""

    def __init__(self, config: QFormerConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.queries, config.width) * config.width**-0.5)
        self.query_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.transformer = Transformer(config.stack(in_dim))
        self.out = MLPStack(config.width, out_dim, 1)

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        return fixed_tokens(self.out(self.states(x_UND, is_valid_UN)), is_valid_UN)

    def states(self, x_UND: Tensor, is_valid_UN: Tensor) -> Tensor:
        """States ``[U, M, width]`` of the queries before the last map."""
        queries_UMD = self.query_norm(self.queries).expand(len(x_UND), -1, -1)
        states: Tensor = self.transformer(queries_UMD, Layout(causal=False), memory=Memory(x_UND, is_valid_UN))
        return states
