"""The latent backbone: learned latents read every stream's tokens, then think among themselves.

Shape legend: ``S`` samples, ``M`` tokens of all streams, ``C`` their width, ``L`` latents, ``D`` their width, ``Q``
queries, ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.models.layers.mlp import MLP, Activation
from polymodal.models.layers.transformer import initialise


class LatentConfig(Config):
    """Latents read the streams by cross-attention; self-attention among the latents does the rest.

    Cost grows with the number of tokens once, not with every block: pixels, bytes and samples can enter as they are.
    Heads ask the latents with queries of their own.

    Source: Perceiver IO, arXiv 2107.14795, section 3 and figure 2; Perceiver, arXiv 2103.03206, section 3.2 (repeated
    blocks share weights; the inputs are read once).
    """

    use: Literal["latent"] = "latent"
    latents: int = Field(default=64, ge=1)
    """How many learned vectors read the streams."""
    width: int = Field(default=128, ge=1)
    """Width of the latents."""
    input_width: int = Field(default=128, ge=1)
    """Width of the tokens that are read; connectors make it, and a stream without one must have it."""
    depth: int = Field(default=4, ge=1)
    """Self-attention blocks."""
    repeats: int = Field(default=1, ge=1)
    """How often the blocks run, with the same weights."""
    heads: int = Field(default=4, ge=1)
    cross_heads: int = Field(default=1, ge=1)
    """Heads with which the latents read the tokens."""
    qk_width: int | None = Field(default=None, ge=1)
    """Width of queries and keys; None: that of the latents, and when reading what ``cross_width`` says."""
    v_width: int | None = Field(default=None, ge=1)
    """Width of values; None: as queries and keys."""
    cross_width: Literal["tokens", "latents"] = "tokens"
    """Whose width queries and keys have when the latents read, without ``qk_width``."""
    mlp_ratio: int = Field(default=1, ge=1)
    """Hidden width of the blocks' MLPs over ``width``."""
    cross_mlp_ratio: int = Field(default=1, ge=1)
    """The same of the reading block's."""
    activation: Activation = "gelu"
    cross_residual: bool = True
    """Whether what the latents read is added to them, or stands in their place."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for heads, shapes in ((self.heads, self.self_widths), (self.cross_heads, self.cross_widths)):
            if any(size % heads for size in shapes):
                raise ValueError(f"heads {heads} do not divide the widths {shapes} of queries and keys, and of values")
        return self

    @property
    def self_widths(self) -> tuple[int, int]:
        """Widths of queries and keys, and of values, among the latents."""
        keys = self.qk_width or self.width
        return keys, self.v_width or keys

    @property
    def cross_widths(self) -> tuple[int, int]:
        """The same when the latents read."""
        keys = self.qk_width or (self.input_width if self.cross_width == "tokens" else self.width)
        return keys, self.v_width or keys

    def build(self, coded: Collection[str]) -> LatentBackbone:
        """The module; the tokens of streams in ``coded`` carry a learned vector that says whose they are."""
        return LatentBackbone(self, coded)


class LatentBlock(nn.Module):
    """Attention from one set of vectors to another or to itself, then an MLP; norms stand before.

    Args:
        width: of the vectors that look.
        memory_width: of those they look at; None: they look at each other.
        widths: of queries and keys, and of values.
        heads: ``H``.
        mlp_ratio: hidden width of the MLP over ``width``.
        activation: of the MLP.
        residual: whether what was seen is added to what looked.
    """

    def __init__(
        self,
        width: int,
        memory_width: int | None,
        widths: tuple[int, int],
        heads: int,
        mlp_ratio: int,
        *,
        activation: Activation = "gelu",
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        source = memory_width or width
        self.attention_norm = nn.LayerNorm(width)
        self.memory_norm = None if memory_width is None else nn.LayerNorm(memory_width)
        self.q_proj, self.k_proj = nn.Linear(width, widths[0]), nn.Linear(source, widths[0])
        self.v_proj, self.out_proj = nn.Linear(source, widths[1]), nn.Linear(widths[1], width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width, activation, gated=False, bias=True)

    def forward(self, x_SQD: Tensor, memory_SMC: Tensor | None = None, is_valid_SM: Tensor | None = None) -> Tensor:
        """New vectors; a row whose memory is all padding sees zeros."""
        inner_SQD = self.attention_norm(x_SQD)
        source = inner_SQD if memory_SMC is None or self.memory_norm is None else self.memory_norm(memory_SMC)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj(inner_SQD), self.k_proj(source), self.v_proj(source))
        )
        mask = None
        if is_valid_SM is not None and not bool(is_valid_SM.all()):
            has_any_S1 = is_valid_SM.any(dim=1, keepdim=True)
            mask = (is_valid_SM | ~has_any_S1)[:, None, None]
            v = v * is_valid_SM[:, None, :, None]
        seen_SQD = self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        x_SQD = x_SQD + seen_SQD if self.residual else seen_SQD
        out: Tensor = x_SQD + self.mlp(self.mlp_norm(x_SQD))
        return out


class LatentBackbone(nn.Module):
    """See :class:`LatentConfig`."""

    def __init__(self, config: LatentConfig, coded: Collection[str]) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.latents = nn.Parameter(torch.randn(config.latents, width) * width**-0.5)
        scale = config.input_width**-0.5
        self.codes = nn.ParameterDict({name: torch.randn(config.input_width) * scale for name in coded})
        self.read = LatentBlock(
            width,
            config.input_width,
            config.cross_widths,
            config.cross_heads,
            config.cross_mlp_ratio,
            activation=config.activation,
            residual=config.cross_residual,
        )
        self.blocks = nn.ModuleList(
            LatentBlock(width, None, config.self_widths, config.heads, config.mlp_ratio, activation=config.activation)
            for _ in range(config.depth)
        )
        initialise(self, config.depth)

    def forward(self, tokens: Mapping[str, Tensor], is_valid: Mapping[str, Tensor]) -> Tensor:
        """The latents of every sample, ``[S, L, D]``.

        Args:
            tokens: per stream that has items in the batch, ``[S, M, C]``; padding anywhere.
            is_valid: per stream, bool ``[S, M]``.

        Raises:
            ConfigError: if no stream has an item in the batch.
        """
        if not tokens:
            raise ConfigError("latent: no sample of the batch has one of the streams that the latents read")
        coded = [part + self.codes[name] if name in self.codes else part for name, part in tokens.items()]
        memory_SMC = torch.cat(coded, dim=1)
        is_valid_SM = torch.cat([is_valid[name] for name in tokens], dim=1)
        z_SLD: Tensor = self.read(self.latents.expand(len(memory_SMC), -1, -1), memory_SMC, is_valid_SM)
        for _ in range(self.config.repeats):
            for block in self.blocks:
                z_SLD = block(z_SLD)
        return z_SLD
