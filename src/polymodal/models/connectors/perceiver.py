"""The Perceiver resampler. Legend: ``U`` units, ``N`` features, ``M`` latents, ``D`` width."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.models.connectors.base import Connector, ConnectorConfig, fixed_tokens
from polymodal.models.connectors.projections import MLPStack
from polymodal.models.layers import MLP, Attention, Layout, Memory, initialise


class PerceiverConfig(ConnectorConfig):
    """Learned latents that read the features and themselves, block by block.

    Source: Flamingo, arXiv 2204.14198, section 3.1 and appendix A.1.1: keys and values are features and latents
    together. Deviations: features come in their own width through a linear map; no time codes (video encoders
    add theirs).
    """

    use: Literal["perceiver"] = "perceiver"
    latents: int = Field(default=32, ge=1)
    """Latents, and so tokens, of a unit."""
    width: int = Field(default=128, ge=1)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def num_tokens(self, num_features: int) -> int:
        """As many as latents; none without features."""
        return self.latents if num_features else 0

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module."""
        return Perceiver(self, in_dim, out_dim)


class ResamplerBlock(nn.Module):
    """Latents attend to features and latents, then an MLP; each with a residual.

    Args:
        width: ``D``.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.feature_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, heads, width // heads, memory_width=width, qkv_bias=False, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, "gelu", gated=False, bias=False)

    def forward(self, latents_UMD: Tensor, x_UND: Tensor, is_valid_UK: Tensor) -> Tensor:
        """New latents; ``is_valid_UK`` covers features and latents."""
        inner_UMD = self.latent_norm(latents_UMD)
        memory = Memory(torch.cat((self.feature_norm(x_UND), inner_UMD), dim=1), is_valid_UK)
        latents_UMD = latents_UMD + self.attention.cross(inner_UMD, memory, Layout(causal=False))
        out: Tensor = latents_UMD + self.mlp(self.mlp_norm(latents_UMD))
        return out


class Perceiver(Connector):
    """See :class:`PerceiverConfig`."""

    def __init__(self, config: PerceiverConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.latents, config.width) * config.width**-0.5)
        self.in_proj = nn.Linear(in_dim, config.width)
        self.blocks = nn.ModuleList(ResamplerBlock(config.width, config.heads) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width)
        initialise(self, config.depth)
        self.out = MLPStack(config.width, out_dim, 1)

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        x_UND = self.in_proj(x_UND)
        latents_UMD = self.latents.expand(len(x_UND), -1, -1)
        is_valid_UK = torch.cat((is_valid_UN, is_valid_UN.new_ones(latents_UMD.shape[:2])), dim=1)
        for block in self.blocks:
            latents_UMD = block(latents_UMD, x_UND, is_valid_UK)
        return fixed_tokens(self.out(self.final_norm(latents_UMD)), is_valid_UN)
