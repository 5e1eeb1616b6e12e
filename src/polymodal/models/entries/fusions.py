"""Fusions: the tokens of several streams -> one state per sample.

Every fusion obeys one contract: ``forward(tokens, is_valid) -> state [S, W]`` with, per stream, ``tokens [S, M, W]``
and ``is_valid [S, M]``. A sample that lacks a stream has no valid token there, and the result is what it would be
without that stream. Every fusion states the axis on which streams meet.

Shape legend: ``S`` samples, ``M`` tokens of a stream, ``W`` width, ``N`` streams, ``Q`` queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from polymodal.core.config import Config, Table
from polymodal.core.errors import ConfigError
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory
from polymodal.models.layers.transformer import Transformer, TransformerConfig

Tokens = Mapping[str, Tensor]


class FusionConfig(Config):
    """Base of the fusion configs."""

    use: str

    def check(self, takes: Mapping[str, str]) -> None:
        """Refuse streams that this fusion cannot merge; ``takes``: whether each gives ``pooled`` or ``tokens``.

        Raises:
            ConfigError: if it cannot.
        """

    def build(self, streams: Sequence[str], width: int) -> nn.Module:
        """The fusion of the named streams, each ``width`` wide."""
        raise NotImplementedError


def _pool(tokens_SMW: Tensor, is_valid_SM: Tensor) -> Tensor:
    """Mean of the valid tokens ``[S, W]``; zero where there is none."""
    weight = is_valid_SM.to(tokens_SMW.dtype).unsqueeze(-1)
    return (tokens_SMW * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def _vectors(tokens: Tokens, is_valid: Tokens, streams: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Pooled vectors ``[S, N, W]`` and which of them are there ``[S, N]``."""
    vectors = torch.stack([_pool(tokens[name], is_valid[name]) for name in streams], dim=1)
    present = torch.stack([is_valid[name].any(1) for name in streams], dim=1)
    return vectors, present


def _mlp(in_dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class SumConfig(FusionConfig):
    """Additive late fusion: the sum of the pooled vectors. No interaction between streams can be expressed."""

    use: Literal["sum"] = "sum"

    def build(self, streams: Sequence[str], width: int) -> nn.Module:
        """The fusion."""
        return SumFusion(streams, width)


class SumFusion(nn.Module):
    """``state = sum of present vectors``, each through its own linear map."""

    def __init__(self, streams: Sequence[str], width: int) -> None:
        super().__init__()
        self.streams = tuple(streams)
        self.maps = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in streams})

    def forward(self, tokens: Tokens, is_valid: Tokens) -> Tensor:
        """``[S, W]``."""
        vectors_SNW, present_SN = _vectors(tokens, is_valid, self.streams)
        mapped = torch.stack([self.maps[name](vectors_SNW[:, i]) for i, name in enumerate(self.streams)], dim=1)
        return (mapped * present_SN.unsqueeze(-1)).sum(1)


class ConcatConfig(FusionConfig):
    """Concatenation, on a stated axis.

    ``feature``: pooled vectors side by side, ``N * W`` wide, through an MLP (a missing one is zero). ``sequence``: all
    tokens in one sequence, each with its stream's embedding, through a bidirectional transformer; the state is their
    mean.
    """

    use: Literal["concat"] = "concat"
    axis: Literal["feature", "sequence"]
    depth: PositiveInt = 1
    heads: PositiveInt = 4

    def build(self, streams: Sequence[str], width: int) -> nn.Module:
        """The fusion."""
        if self.axis == "feature":
            return FeatureConcat(streams, width)
        return SequenceConcat(self, streams, width)


class FeatureConcat(nn.Module):
    """``state = MLP([v_1; ...; v_N])``."""

    def __init__(self, streams: Sequence[str], width: int) -> None:
        super().__init__()
        self.streams = tuple(streams)
        self.mlp = _mlp(len(streams) * width, width)

    def forward(self, tokens: Tokens, is_valid: Tokens) -> Tensor:
        """``[S, W]``."""
        vectors_SNW, present_SN = _vectors(tokens, is_valid, self.streams)
        state: Tensor = self.mlp((vectors_SNW * present_SN.unsqueeze(-1)).flatten(1))
        return state


class SequenceConcat(nn.Module):
    """All tokens attend to all tokens."""

    def __init__(self, config: ConcatConfig, streams: Sequence[str], width: int) -> None:
        super().__init__()
        self.streams = tuple(streams)
        self.stream_embeddings = nn.Parameter(torch.randn(len(streams), width) * width**-0.5)
        self.transformer = Transformer(TransformerConfig(width=width, depth=config.depth, heads=config.heads))

    def forward(self, tokens: Tokens, is_valid: Tokens) -> Tensor:
        """``[S, W]``."""
        x = torch.cat([tokens[name] + self.stream_embeddings[i] for i, name in enumerate(self.streams)], dim=1)
        valid = torch.cat([is_valid[name] for name in self.streams], dim=1)
        return _pool(self.transformer(x, Layout.padded(valid, causal=False)), valid)


class ProductConfig(FusionConfig):
    """Elementwise product of the pooled vectors; a missing one counts as one (Fukui 1606.01847 motivates products)."""

    use: Literal["product"] = "product"

    def build(self, streams: Sequence[str], width: int) -> nn.Module:
        """The fusion."""
        return ProductFusion(streams, width)


class ProductFusion(nn.Module):
    """``state = MLP(prod of map_i(v_i))``."""

    def __init__(self, streams: Sequence[str], width: int) -> None:
        super().__init__()
        self.streams = tuple(streams)
        maps = {name: nn.Linear(width, width) for name in streams}
        for layer in maps.values():
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.maps = nn.ModuleDict(maps)
        self.mlp = _mlp(width, width)

    def forward(self, tokens: Tokens, is_valid: Tokens) -> Tensor:
        """``[S, W]``."""
        vectors_SNW, present_SN = _vectors(tokens, is_valid, self.streams)
        state = torch.ones_like(vectors_SNW[:, 0])
        for i, name in enumerate(self.streams):
            factor = self.maps[name](vectors_SNW[:, i])
            state = state * torch.where(present_SN[:, i, None], factor, torch.ones_like(factor))
        merged: Tensor = self.mlp(state)
        return merged


class GatedConfig(FusionConfig):
    """Gated multimodal unit: per feature, a gate that sees all streams chooses among them.

    Source: Arevalo 1702.01992 sec. 3; see :class:`WeightedFusion` for the deviation.
    """

    use: Literal["gated"] = "gated"

    def build(self, streams: Sequence[str], width: int) -> nn.Module:
        """The fusion."""
        return WeightedFusion(streams, width, per_feature=True)


class DynamicConfig(FusionConfig):
    """Dynamic weights: one weight per stream and sample, from all streams, that sum to one over those present."""

    use: Literal["dynamic"] = "dynamic"

    def build(self, streams: Sequence[str], width: int) -> nn.Module:
        """The fusion."""
        return WeightedFusion(streams, width, per_feature=False)


class WeightedFusion(nn.Module):
    """``state = sum_i w_i * tanh(map_i(v_i))`` with softmax weights over the streams that are present.

    Deviation from Arevalo: softmax over N streams in place of a sigmoid per stream, so that absent streams drop out.
    """

    def __init__(self, streams: Sequence[str], width: int, *, per_feature: bool) -> None:
        super().__init__()
        self.streams = tuple(streams)
        self.maps = nn.ModuleDict({name: nn.Linear(width, width) for name in streams})
        self.gate = _mlp(len(streams) * width, len(streams) * (width if per_feature else 1))

    def weights(self, vectors_SNW: Tensor, present_SN: Tensor) -> Tensor:
        """``[S, N, W]`` (gated) or ``[S, N, 1]`` (dynamic) weights that sum to one over present streams."""
        num_streams = vectors_SNW.shape[1]
        scores = self.gate((vectors_SNW * present_SN.unsqueeze(-1)).flatten(1)).unflatten(1, (num_streams, -1))
        scores = scores.masked_fill(~present_SN.unsqueeze(-1), torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=1)

    def forward(self, tokens: Tokens, is_valid: Tokens) -> Tensor:
        """``[S, W]``."""
        vectors_SNW, present_SN = _vectors(tokens, is_valid, self.streams)
        mapped = [torch.tanh(self.maps[name](vectors_SNW[:, i])) for i, name in enumerate(self.streams)]
        return (self.weights(vectors_SNW, present_SN) * torch.stack(mapped, dim=1)).sum(1)


class CrossAttentionConfig(FusionConfig):
    """Queries attend to the tokens of the other streams.

    ``query`` names the stream that asks (its tokens attend to all others, ViLBERT-like 1908.02265), or ``learned``
    for learned queries over all streams. A sample that lacks the stream that asks has no state but zero: give that
    stream ``missing: learned``.
    """

    use: Literal["cross_attention"] = "cross_attention"
    query: str = "learned"
    num_queries: PositiveInt = 4
    depth: PositiveInt = 2
    heads: PositiveInt = 4

    def check(self, takes: Mapping[str, str]) -> None:
        """Prove that there is something to attend to, and something to choose from.

        Raises:
            ConfigError: if ``query`` names no stream, or attention would see a single key.
        """
        if self.query != "learned" and self.query not in takes:
            raise ConfigError(
                f"fusion cross_attention: query is {self.query!r}, expected 'learned' or one of {list(takes)}"
            )
        keys = [name for name in takes if name != self.query]
        if len(takes) < 2 or (len(keys) == 1 and takes[keys[0]] == "pooled"):
            raise ConfigError(
                f"fusion cross_attention: the keys are {[f'{name}: {takes[name]}' for name in keys]}, expected at "
                "least two; attention over a single key ignores its query; merge more streams, or take: tokens"
            )

    def build(self, streams: Sequence[str], width: int) -> nn.Module:
        """The fusion."""
        return CrossAttentionFusion(self, streams, width)


class CrossAttentionFusion(nn.Module):
    """A transformer whose blocks attend to the other streams' tokens; the state is the mean over its queries."""

    def __init__(self, config: CrossAttentionConfig, streams: Sequence[str], width: int) -> None:
        super().__init__()
        self.query = config.query
        self.keys = tuple(name for name in streams if name != config.query)
        self.stream_embeddings = nn.Parameter(torch.randn(len(self.keys), width) * width**-0.5)
        self.queries: nn.Parameter | None = None
        if config.query == "learned":
            self.queries = nn.Parameter(torch.randn(config.num_queries, width) * width**-0.5)
        self.transformer = Transformer(
            TransformerConfig(width=width, depth=config.depth, heads=config.heads, cross_width=width)
        )

    def forward(self, tokens: Tokens, is_valid: Tokens) -> Tensor:
        """``[S, W]``."""
        memory = torch.cat([tokens[name] + self.stream_embeddings[i] for i, name in enumerate(self.keys)], dim=1)
        memory_valid = torch.cat([is_valid[name] for name in self.keys], dim=1)
        if self.queries is not None:
            x = self.queries.expand(len(memory), -1, -1)
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            x, valid = tokens[self.query], is_valid[self.query]
        layout = Layout.padded(valid, causal=False)
        return _pool(self.transformer(x, layout, memory=Memory(memory, memory_valid)), valid)


FUSIONS: Table[FusionConfig] = Table(
    "fusion", [SumConfig, ConcatConfig, ProductConfig, GatedConfig, DynamicConfig, CrossAttentionConfig]
)
"""Every fusion by name."""
