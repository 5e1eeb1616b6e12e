"""The Perceiver resampler. Legend: ``U`` units, ``N`` features, ``M`` latents, ``D`` width."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.connectors.base import Connector, ConnectorConfig, fixed_tokens
from polymodal.models.connectors.projections import MLPStack
from polymodal.models.layers import MLP, Activation, Attention, AttentionExtras, Layout, Memory, initialise


class PerceiverConfig(ConnectorConfig):
    """Learned latents that read the features and themselves, block by block.

    Source: Flamingo, arXiv 2204.14198, section 3.1 and appendix A.1.1: keys and values are features and latents
    together. Deviations: features come in their own width through a linear map unless ``project`` is off; no time codes
    (video encoders add theirs).
    """

    use: Literal["perceiver"] = "perceiver"
    latents: int = Field(default=32, ge=1)
    """Latents, and so tokens, of a unit."""
    width: int = Field(default=128, ge=1)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    """Width of one head; None: width / heads."""
    activation: Activation = "gelu"
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    project: bool = True
    """Whether a linear map leads from the features' width and another to the backbone's; without them the encoder, the
    latents and what a decoder looks at are equally wide (Idefics)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def num_tokens(self, num_features: int) -> int:
        """As many as latents; none without features."""
        return self.latents if num_features else 0

    def width_for(self, out_dim: int) -> int:
        """Its own where nothing maps the latents."""
        return out_dim if self.project else self.width

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module.

        Raises:
            ConfigError: if widths differ that nothing maps.
        """
        if not self.project and {in_dim, out_dim} != {self.width}:
            raise ConfigError(
                f"connector perceiver: found features of width {in_dim}, latents of {self.width} and tokens of "
                f"{out_dim}, expected equal widths with project: false"
            )
        return Perceiver(self, in_dim, out_dim)


class ResamplerBlock(nn.Module):
    """Latents attend to features and latents, then an MLP; each with a residual.

    Args:
        config: of the connector.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.feature_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.attention = Attention(
            width,
            heads,
            heads,
            config.head_dim or width // heads,
            memory_width=width,
            qkv_bias=False,
            bias=False,
            extras=AttentionExtras(qk_norm="layer" if config.qk_norm else None),
        )
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, config.activation, gated=False, bias=False)

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
        self.in_proj = nn.Linear(in_dim, config.width) if config.project else None
        self.blocks = nn.ModuleList(ResamplerBlock(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width)
        initialise(self, config.depth)
        self.out = MLPStack(config.width, out_dim, 1) if config.project else None

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        if self.in_proj is not None:
            x_UND = self.in_proj(x_UND)
        latents_UMD = self.latents.expand(len(x_UND), -1, -1)
        is_valid_UK = torch.cat((is_valid_UN, is_valid_UN.new_ones(latents_UMD.shape[:2])), dim=1)
        for block in self.blocks:
            latents_UMD = block(latents_UMD, x_UND, is_valid_UK)
        tokens_UMD = self.final_norm(latents_UMD)
        return fixed_tokens(tokens_UMD if self.out is None else self.out(tokens_UMD), is_valid_UN)
