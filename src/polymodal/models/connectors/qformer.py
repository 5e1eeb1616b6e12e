"""The querying transformer.

Legend: ``U`` units, ``N`` features, ``M`` queries, ``L`` words, ``T`` both, ``D`` width.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.models.connectors.base import Connector, ConnectorConfig, fixed_tokens
from polymodal.models.connectors.projections import MLPStack
from polymodal.models.layers import MLP, Activation, Block, Layout, Memory, Transformer, TransformerConfig, initialise

Words = tuple[Tensor, Tensor]
"""Embedded words ``[U, L, width]`` and which are valid, bool ``[U, L]``."""


class QFormerConfig(ConnectorConfig):
    """Learned queries that attend to each other and, in every n-th block, to the features.

    Source: BLIP-2, arXiv 2301.12597, section 3.1: BERT's blocks (norms after the residual sums); with ``words``, its
    section 3.2, and InstructBLIP, arXiv 2305.06500, section 2.3.
    """

    use: Literal["qformer"] = "qformer"
    queries: int = Field(default=32, ge=1)
    """Queries, and so tokens, of a unit."""
    width: int = Field(default=128, ge=1)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp_dim: int | None = Field(default=None, ge=1)
    """Hidden width of the MLPs; None: 4 x width."""
    activation: Activation = "gelu"
    cross_every: int = Field(default=2, ge=1)
    """Blocks 0, n, 2n, ... attend to the features."""
    words: bool = False
    """Whether words may stand beside the queries, share their attention, have MLPs of their own and do not see the
    features. They come from the stream that enters by ``instruction`` or ``beside_queries``."""
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
                "activation": self.activation,
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

    def build(self, in_dim: int, out_dim: int | None) -> Connector:
        """The module; without ``out_dim`` it gives no tokens, and heads read its states."""
        return QFormer(self, in_dim, out_dim)


class QFormer(Connector):
    """See :class:`QFormerConfig`."""

    def __init__(self, config: QFormerConfig, in_dim: int, out_dim: int | None) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.queries, config.width) * config.width**-0.5)
        self.query_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.transformer = Transformer(config.stack(in_dim))
        self.out = None if out_dim is None else MLPStack(config.width, out_dim, 1)
        self.word_paths: nn.ModuleList | None = None
        if config.words:
            self.word_paths = nn.ModuleList(WordPath(config) for _ in range(config.depth))

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor, words: Words | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`; ``words`` stand beside the queries."""
        assert self.out is not None
        return fixed_tokens(self.out(self.states(x_UND, is_valid_UN, words)), is_valid_UN)

    def states(self, x_UND: Tensor, is_valid_UN: Tensor, words: Words | None = None) -> Tensor:
        """States ``[U, M, width]`` of the queries before the last map."""
        return self.read(Memory(x_UND, is_valid_UN), words)[0]

    def read(self, memory: Memory | None, words: Words | None = None, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        """States of the queries ``[U, M, width]`` and of the words ``[U, L, width]``.

        Who sees whom, for queries ``q`` and two words (rows look at columns), together, ``causal``, and apart::

                q a b       q a b       q       a b
            q   1 1 1   q   1 0 0   q   1   a   1 1
            a   1 1 1   a   1 1 0           b   1 1
            b   1 1 1   b   1 1 1

        Source: BLIP-2, arXiv 2301.12597, figure 2: the masks of matching, of generation, and of contrast.

        Args:
            memory: features that the queries look at; None: there are no queries, the words stand alone.
            words: None: the queries stand alone.
            causal: whether a word sees the words before it alone, and the queries see no word.
        """
        if words is None:
            assert memory is not None
            queries_UMD = self.query_norm(self.queries).expand(len(memory.x_BMC), -1, -1)
            return self.transformer(queries_UMD, Layout(causal=False), memory=memory), queries_UMD[:, :0]
        words_ULD, is_word_UL = self.query_norm(words[0]), words[1]
        queries_MD = self.queries if memory is not None else self.queries[:0]
        queries_UMD = self.query_norm(queries_MD).expand(len(words_ULD), -1, -1)
        is_valid_UT = torch.cat((is_word_UL.new_ones(queries_UMD.shape[:2]), is_word_UL), dim=1)
        is_word_T = torch.arange(is_valid_UT.shape[1], device=is_word_UL.device) >= queries_UMD.shape[1]
        layout = Layout.prefixed(is_valid_UT, is_word_T) if causal else Layout.padded(is_valid_UT, causal=False)
        return self._side_by_side(queries_UMD, words_ULD, layout, memory)

    def _side_by_side(
        self, queries_UMD: Tensor, words_ULD: Tensor, layout: Layout, memory: Memory | None
    ) -> tuple[Tensor, Tensor]:
        """The stack over queries and words, block by block, since the two part ways within each."""
        assert self.word_paths is not None
        count = queries_UMD.shape[1]
        x_UTD = torch.cat((queries_UMD, words_ULD.to(queries_UMD.dtype)), dim=1)
        step = self.transformer.step(x_UTD, layout)
        for layer, (block, path) in enumerate(zip(self.transformer.blocks, self.word_paths, strict=True)):
            assert isinstance(block, Block)
            x_UTD = block.attention_norm(x_UTD + block.dropout(block.attention(x_UTD, step, layer)))
            queries_UMD, words_ULD = x_UTD[:, :count], x_UTD[:, count:]
            if block.cross_attention is not None and block.cross_norm is not None and memory is not None:
                seen = block.cross_attention.cross(queries_UMD, memory, Layout(causal=False))
                queries_UMD = block.cross_norm(queries_UMD + block.dropout(seen))
            if count:
                queries_UMD = block.mlp_norm(queries_UMD + block.dropout(block.mlp(queries_UMD)))
            x_UTD = torch.cat((queries_UMD, path(words_ULD)), dim=1)
        return x_UTD[:, :count], x_UTD[:, count:]


class WordPath(nn.Module):
    """What words pass in a block in place of the queries' MLP.

    Args:
        config: of the connector.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        hidden = config.mlp_dim or 4 * config.width
        self.mlp = MLP(config.width, hidden, config.activation, gated=False, bias=True)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        initialise(self, config.depth)

    def forward(self, x_ULD: Tensor) -> Tensor:
        """The MLP, the residual sum and its norm."""
        out: Tensor = self.mlp_norm(x_ULD + self.dropout(self.mlp(x_ULD)))
        return out
