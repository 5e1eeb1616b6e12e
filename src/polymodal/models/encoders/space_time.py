"""A vision transformer over the frames of a video whose every block also looks along time.

Legend: ``U`` videos, ``L`` frames, ``P`` patches of a frame, ``T = 1 + P`` tokens of a frame, ``N`` features, ``D``
width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import MLP, Attention, Layout, LearnedPositions, Memory, initialise
from polymodal.models.layers.convolution import valid_mask


class SpaceTimeConfig(TransformerEncoderConfig):
    """Patches of frames with a class token; how they look along time is ``attention``.

    Source: TimeSformer, arXiv 2102.05095, section 3 (``divided``, ``joint``); X-CLIP, arXiv 2208.02816, section 3.2
    (``messages``: the cross-frame communication transformer).
    """

    use: Literal["space_time"] = "space_time"
    modality: ClassVar[str] = "video"
    image_size: int = Field(default=64, ge=1)
    """Side of a square frame in pixels."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch in pixels."""
    num_frames: int = Field(default=32, ge=1)
    """Frames that the default reader takes; with codes of time also the most that the encoder takes."""
    attention: Literal["divided", "joint", "messages"] = "divided"
    """``divided``: each patch looks at its place in all frames, then at its frame. ``joint``: at all patches of all
    frames. ``messages``: each frame looks at itself and at a message from its class token, which has looked at the
    messages of all frames."""
    features: Literal["patches", "frames"] = "patches"
    """The patches, frame by frame; or each frame's class token before its patches (``messages`` alone, where every
    frame has a class token of its own)."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias."""
    embed_norm: bool = False
    """Whether the tokens are normalised before the first block (CLIP)."""
    final_norm: bool = True
    """Whether features and pooled vector are normalised."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.features == "frames" and self.attention != "messages":
            raise ValueError(f"features: frames goes with attention: messages, found attention: {self.attention}")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``: one frame."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """Patches of every frame, and its class token where ``features`` is ``frames``."""
        return length * (self.grid**2 + (self.features == "frames"))

    def default_reader(self) -> VideoReaderConfig:
        """Frames of this size."""
        return VideoReaderConfig(num_frames=self.num_frames, size_px=self.image_size)

    def build(self) -> SpaceTime:
        """The module."""
        return SpaceTime(self)


class SpaceTimeBlock(nn.Module):
    """One block; see :class:`SpaceTimeConfig`.

    Args:
        config: of the encoder.
    """

    def __init__(self, config: SpaceTimeConfig) -> None:
        super().__init__()
        width = config.width
        self.kind = config.attention
        if self.kind != "joint":
            # ``divided`` maps what a patch has seen along time, ``messages`` maps class tokens to messages.
            self.time_proj = nn.Linear(width, width)
            self.time_norm = nn.LayerNorm(width, eps=config.norm_eps)
            self.time_attention = _attention(config)
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.attention = _attention(config)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.mlp_dim or 4 * width, config.activation, gated=False, bias=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_ULTD: Tensor, is_valid_UL: Tensor) -> Tensor:
        """Map ``[U, L, T, D]`` to the same shape; the class token stands first in every frame."""
        tokens = x_ULTD.shape[2]
        if self.kind == "divided":
            x_ULTD = torch.cat((x_ULTD[:, :, :1], self._along_time(x_ULTD[:, :, 1:], is_valid_UL)), dim=2)
        if self.kind == "joint":
            x_ULTD = x_ULTD + self._everywhere(self.attention_norm(x_ULTD), is_valid_UL)
        else:
            if self.kind == "messages":
                x_ULTD = torch.cat((x_ULTD, self._messages(x_ULTD[:, :, 0], is_valid_UL)), dim=2)
            rows = x_ULTD.flatten(0, 1)
            rows = rows + self._attend(self.attention, self.attention_norm(rows))
            x_ULTD = rows.view_as(x_ULTD)[:, :, :tokens]
        if self.kind == "divided":
            # One class token for the video: the mean of what it has seen in each frame.
            seen_ULD = x_ULTD[:, :, 0] * is_valid_UL[..., None]
            mean_UD = seen_ULD.sum(dim=1) / is_valid_UL.sum(dim=1, keepdim=True)
            x_ULTD = torch.cat((mean_UD[:, None, None].expand_as(x_ULTD[:, :, :1]), x_ULTD[:, :, 1:]), dim=2)
        out: Tensor = x_ULTD + self.dropout(self.mlp(self.mlp_norm(x_ULTD)))
        return out

    def _attend(self, attention: Attention, rows: Tensor, is_valid: Tensor | None = None) -> Tensor:
        out: Tensor = self.dropout(attention.cross(rows, Memory(rows, is_valid), Layout(causal=False)))
        return out

    def _along_time(self, x_ULPD: Tensor, is_valid_UL: Tensor) -> Tensor:
        places = x_ULPD.shape[2]
        rows = x_ULPD.transpose(1, 2).flatten(0, 1)
        branch = self._attend(self.time_attention, self.time_norm(rows), is_valid_UL.repeat_interleave(places, dim=0))
        seen_ULPD: Tensor = self.time_proj(branch).view(-1, places, *branch.shape[1:]).transpose(1, 2)
        return x_ULPD + seen_ULPD

    def _everywhere(self, x_ULTD: Tensor, is_valid_UL: Tensor) -> Tensor:
        """Attention among all patches and one class token, which stands in every frame."""
        length, tokens = x_ULTD.shape[1:3]
        x_UTD = torch.cat((x_ULTD[:, 0, :1], x_ULTD[:, :, 1:].flatten(1, 2)), dim=1)
        is_valid_UT = is_valid_UL.repeat_interleave(tokens - 1, dim=1)
        is_valid_UT = torch.cat((is_valid_UT.new_ones(len(is_valid_UT), 1), is_valid_UT), dim=1)
        seen_UTD = self._attend(self.attention, x_UTD, is_valid_UT)
        patches_ULPD = seen_UTD[:, 1:].view(len(seen_UTD), length, tokens - 1, -1)
        return torch.cat((seen_UTD[:, None, :1].expand(-1, length, -1, -1), patches_ULPD), dim=2)

    def _messages(self, cls_ULD: Tensor, is_valid_UL: Tensor) -> Tensor:
        message_ULD: Tensor = self.time_proj(cls_ULD)
        seen_ULD = self._attend(self.time_attention, self.time_norm(message_ULD), is_valid_UL)
        return (message_ULD + seen_ULD)[:, :, None]


class SpaceTime(Encoder):
    """See :class:`SpaceTimeConfig`."""

    config: SpaceTimeConfig

    def __init__(self, config: SpaceTimeConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.cls_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positions = LearnedPositions(1 + config.grid**2, width)
        has_time = config.attention != "messages"
        self.time_positions = LearnedPositions(config.num_frames, width) if has_time else None
        self.embed_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.embed_norm else None
        self.blocks = nn.ModuleList(SpaceTimeBlock(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.final_norm else None
        initialise(self, config.depth)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode frames ``[U, L, 3, S, S]``.

        Raises:
            ConfigError: if a video has more frames than there are codes of time.
        """
        self.require_shape(values)
        num_units, length = values.shape[:2]
        is_valid_UL = valid_mask(lengths_U, length)
        patches_ULPD = self.patch_embed(values.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (-1, length))
        cls_ULTD = self.cls_token.expand(num_units, length, 1, -1)
        x_ULTD = torch.cat((cls_ULTD, patches_ULPD), dim=2) + self.positions.weight
        if self.time_positions is not None:
            longest = int(lengths_U.max())
            if longest > self.config.num_frames:
                raise ConfigError(
                    f"space_time: found a video of {longest} frames, expected at most num_frames "
                    f"{self.config.num_frames}, which have codes of time; let the reader take fewer"
                )
            places_L = torch.arange(length, device=values.device).clamp(max=self.config.num_frames - 1)
            codes_L1D = self.time_positions(places_L)[:, None]
            x_ULTD = torch.cat((x_ULTD[:, :, :1], x_ULTD[:, :, 1:] + codes_L1D), dim=2)
        if self.embed_norm is not None:
            x_ULTD = self.embed_norm(x_ULTD)
        for block in self.blocks:
            x_ULTD = block(x_ULTD, is_valid_UL)
        if self.final_norm is not None:
            x_ULTD = self.final_norm(x_ULTD)
        kept_ULTD = x_ULTD if self.config.features == "frames" else x_ULTD[:, :, 1:]
        weight_UL1 = (is_valid_UL / is_valid_UL.sum(dim=1, keepdim=True))[..., None].to(x_ULTD.dtype)
        pooled_UD = (x_ULTD[:, :, 0] * weight_UL1).sum(dim=1)
        return finish(kept_ULTD.flatten(1, 2), is_valid_UL.repeat_interleave(kept_ULTD.shape[2], dim=1), pooled_UD)


def _attention(config: SpaceTimeConfig) -> Attention:
    heads = config.heads
    return Attention(config.width, heads, heads, config.width // heads, dropout=config.dropout)
