"""Videos against texts, each text seen in the light of each video.

Legend: ``V`` videos, ``L`` frames, ``P`` patches of a frame, ``T`` texts, ``D`` width of the frames' features, ``E`` of
the shared space.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.encoders.base import Features
from polymodal.models.encoders.space_time import SpaceTimeConfig
from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers import (
    MLP,
    Activation,
    Attention,
    Layout,
    Memory,
    Transformer,
    TransformerConfig,
    initialise,
)


class PromptedPairsConfig(HeadConfig):
    """A transformer joins the frames' class tokens into one vector; patches prompt each text's vector.

    Source: X-CLIP, arXiv 2208.02816, section 3.2 (multi-frame integration) and 3.3 (video-specific prompting).
    """

    use: Literal["prompted_pairs"] = "prompted_pairs"
    video: str = "video"
    """A stream whose encoder is ``space_time`` with ``features: frames``."""
    text: str = "text"
    """A text stream, of which the pooled vectors are taken."""
    dim: int = Field(default=512, ge=2)
    """Width of the shared space."""
    depth: int = Field(default=1, ge=1)
    """Blocks that join the frames."""
    heads: int = Field(default=8, ge=1)
    mlp_dim: int | None = Field(default=None, ge=1)
    """Hidden width of their MLPs; None: 4 x dim."""
    prompt_depth: int = Field(default=2, ge=1)
    """Layers in which a text looks at the video's patches."""
    prompt_heads: int = Field(default=8, ge=1)
    """Attention heads of those layers."""
    prompt_share: float = Field(default=0.1, gt=0)
    """Start of the learned share, per channel, of what a text has seen."""
    activation: Activation = "quick_gelu"
    """Of the blocks that join the frames."""
    prompt_activation: Activation = "quick_gelu"
    """Of the layers in which texts look."""
    norm_eps: float = Field(default=1e-5, gt=0)
    temperature: float = Field(default=0.07, gt=0)
    """Start of the learned temperature."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads or self.dim % self.prompt_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads} and of {self.prompt_heads}")
        return self

    def build(self, inputs: HeadInputs) -> PromptedPairsHead:
        """The head."""
        video = inputs.stream_encoders.get(self.video)
        if not isinstance(video, SpaceTimeConfig) or video.features != "frames":
            raise ConfigError(
                f"head {self.use}: found stream {self.video!r} with the encoder {getattr(video, 'use', None)!r}, "
                "expected 'space_time' with features: frames, whose frames have class tokens"
            )
        return PromptedPairsHead(self, video, self._stream_width(self.text, inputs))


class PairScores(NamedTuple):
    """Vectors of unit length and what they say: ``video_VE``, ``text_VTE`` (per video), ``logits_VT``."""

    video_VE: Tensor
    text_VTE: Tensor
    logits_VT: Tensor


class PromptLayer(nn.Module):
    """Texts look at a video's patches, then an MLP; norms stand before.

    Args:
        config: of the head.
    """

    def __init__(self, config: PromptedPairsConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.prompt_heads
        self.attention_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attention = Attention(dim, heads, heads, dim // heads, memory_width=dim, qkv_bias=False)
        self.mlp_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = MLP(dim, 4 * dim, config.prompt_activation, gated=False, bias=True)

    def forward(self, text_VTE: Tensor, patches: Memory) -> Tensor:
        """Texts of the same shape."""
        seen_VTE = self.attention.cross(self.attention_norm(text_VTE), patches, Layout(causal=False))
        text_VTE = text_VTE + seen_VTE
        out: Tensor = text_VTE + self.mlp(self.mlp_norm(text_VTE))
        return out


class PromptedPairsHead(nn.Module):
    """See :class:`PromptedPairsConfig`."""

    def __init__(self, config: PromptedPairsConfig, video: SpaceTimeConfig, text_width: int) -> None:
        super().__init__()
        self.config, self.tokens = config, 1 + video.grid**2
        dim, eps = config.dim, config.norm_eps
        self.frame_norm = nn.LayerNorm(video.width, eps=eps)
        self.frame_proj = nn.Linear(video.width, dim, bias=False)
        self.frame_positions = nn.Parameter(torch.randn(video.num_frames, dim) * dim**-0.5)
        stack: dict[str, Any] = {"width": dim, "depth": config.depth, "heads": config.heads, "mlp_dim": config.mlp_dim}
        stack |= {"activation": config.activation, "norm_eps": eps, "final_norm": False}
        self.integration = Transformer(TransformerConfig.parse(stack))
        self.patch_norm = nn.LayerNorm(video.width, eps=eps)
        self.patch_proj = nn.Linear(video.width, dim, bias=False)
        self.text_proj = nn.Linear(text_width, dim, bias=False)
        self.prompt_norm = nn.LayerNorm(dim, eps=eps)
        self.prompts = nn.ModuleList(PromptLayer(config) for _ in range(config.prompt_depth))
        for part in (self.frame_proj, self.patch_proj, self.text_proj, self.prompts):
            initialise(part, config.prompt_depth)
        self.prompt_share = nn.Parameter(torch.full((dim,), config.prompt_share))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / config.temperature)))

    def forward(self, video: Features, text_TD: Tensor) -> PairScores:
        """Every video against every text.

        Args:
            video: features of the video stream.
            text_TD: pooled vectors of the texts.

        Raises:
            ConfigError: if a video has more frames than there are positions.
        """
        x_VLTD = video.x_UND.view(len(video.x_UND), -1, self.tokens, video.x_UND.shape[2])
        is_valid_VL = video.is_valid_UN[:, :: self.tokens]
        length = x_VLTD.shape[1]
        if length > len(self.frame_positions):
            raise ConfigError(
                f"head prompted_pairs: found a video of {length} frames, expected at most {len(self.frame_positions)} "
                "(num_frames of the encoder)"
            )
        weight_VL1 = (is_valid_VL / is_valid_VL.sum(dim=1, keepdim=True))[..., None].to(x_VLTD.dtype)
        frames_VLE = self.frame_proj(self.frame_norm(x_VLTD[:, :, 0]))
        joined_VLE = frames_VLE + self.integration(
            frames_VLE + self.frame_positions[:length], Layout.padded(is_valid_VL, causal=False)
        )
        video_VE = (joined_VLE * weight_VL1).sum(dim=1)
        patches_VLPE = self.patch_proj(self.patch_norm(x_VLTD[:, :, 1:]))
        patches_VPE = self.prompt_norm((patches_VLPE * weight_VL1[..., None]).sum(dim=1))
        text_VTE = self.text_proj(text_TD).expand(len(video_VE), -1, -1)
        prompt_VTE, memory = text_VTE, Memory(patches_VPE)
        for layer in self.prompts:
            prompt_VTE = layer(prompt_VTE, memory)
        text_VTE = F.normalize((text_VTE + self.prompt_share * prompt_VTE).float(), dim=-1)
        video_VE = F.normalize(video_VE.float(), dim=-1)
        logits_VT = self.log_scale.exp() * torch.einsum("ve,vte->vt", video_VE, text_VTE)
        return PairScores(video_VE, text_VTE, logits_VT)
