"""Connectors that relate features over time. Legend: ``U`` units, ``N`` features in time order, ``D`` width."""

from __future__ import annotations

from abc import ABC
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from polymodal.models.connectors.base import Connector, ConnectorConfig, fixed_tokens, masked
from polymodal.models.connectors.projections import MLPStack
from polymodal.models.layers import Layout, Transformer, TransformerConfig, initialise, sinusoidal


class TemporalFields(ConnectorConfig, ABC):
    """What both temporal connectors share."""

    width: int = Field(default=128, ge=4, multiple_of=2)
    depth: int = Field(default=1, ge=1)
    output: Literal["sequence", "summary"] = "sequence"
    """One token for each feature, or one for the whole unit."""

    def num_tokens(self, num_features: int) -> int:
        """As many as features, or one (none without features)."""
        return num_features if self.output == "sequence" else min(num_features, 1)


class TemporalAttentionConfig(TemporalFields):
    """A transformer over the features in time order (the temporal encoder of ViViT, arXiv 2103.15691, section 3.3)."""

    use: Literal["temporal_attention"] = "temporal_attention"
    heads: int = Field(default=4, ge=1)
    causal: bool = False
    """Whether a token sees only earlier features; its summary is then the last token, else the mean."""

    def stack(self) -> TransformerConfig:
        """The transformer's config."""
        return TransformerConfig.parse({"width": self.width, "depth": self.depth, "heads": self.heads})

    @model_validator(mode="after")
    def _stack_is_possible(self) -> Self:
        self.stack()
        return self

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module."""
        return TemporalAttention(self, in_dim, out_dim)


class TemporalAttention(Connector):
    """See :class:`TemporalAttentionConfig`."""

    def __init__(self, config: TemporalAttentionConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(in_dim, config.width)
        initialise(self.in_proj, 1)
        self.transformer = Transformer(config.stack())
        self.out = MLPStack(config.width, out_dim, 1)

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        x_UND = self.in_proj(x_UND)
        x_UND = x_UND + sinusoidal(x_UND.shape[1], x_UND.shape[2], device=x_UND.device).to(x_UND)
        x_UND = self.transformer(x_UND, Layout.padded(is_valid_UN, self.config.causal))
        if self.config.output == "sequence":
            return masked(self.out(x_UND), is_valid_UN), is_valid_UN
        if self.config.causal:
            last_U11 = (is_valid_UN.sum(dim=1) - 1).clamp(min=0)[:, None, None]
            summary_U1D = x_UND.gather(1, last_U11.expand(-1, -1, x_UND.shape[2]))
        else:
            counts_U11 = is_valid_UN.sum(dim=1).clamp(min=1)[:, None, None]
            summary_U1D = masked(x_UND, is_valid_UN).sum(dim=1, keepdim=True) / counts_U11
        return fixed_tokens(self.out(summary_U1D), is_valid_UN)


class TemporalLstmConfig(TemporalFields):
    """A long short-term memory over the features in time order (LRCN, arXiv 1411.4389, section 3)."""

    use: Literal["temporal_lstm"] = "temporal_lstm"
    bidirectional: bool = False
    """Whether a second one reads backwards; each then has half the width."""

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module."""
        return TemporalLstm(self, in_dim, out_dim)


class TemporalLstm(Connector):
    """See :class:`TemporalLstmConfig`; the summary is the last layer's final state of each direction."""

    def __init__(self, config: TemporalLstmConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.width // 2 if config.bidirectional else config.width
        self.lstm = nn.LSTM(in_dim, hidden, config.depth, batch_first=True, bidirectional=config.bidirectional)
        self.out = MLPStack(config.width, out_dim, 1)

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        # The packing refuses empty units; they are read as one zero step and masked afterwards.
        lengths_U = is_valid_UN.sum(dim=1).clamp(min=1).cpu()
        packed = pack_padded_sequence(masked(x_UND, is_valid_UN), lengths_U, batch_first=True, enforce_sorted=False)
        states, (final, _) = self.lstm(packed)
        if self.config.output == "sequence":
            x_UND, _ = pad_packed_sequence(states, batch_first=True, total_length=x_UND.shape[1])
            return masked(self.out(x_UND), is_valid_UN), is_valid_UN
        directions = 2 if self.config.bidirectional else 1
        summary_U1D = final[-directions:].transpose(0, 1).flatten(1)[:, None]
        return fixed_tokens(self.out(summary_U1D), is_valid_UN)
