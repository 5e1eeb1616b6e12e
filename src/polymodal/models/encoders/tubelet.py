"""Patches in space and time.

Legend: ``U`` videos, ``L`` frames, ``T`` steps, ``P`` patches, ``N = T P``, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, Transformer, TransformerConfig, initialise, sincos_2d, sinusoidal
from polymodal.models.layers.convolution import shortened, valid_mask
from polymodal.models.layers.positions import interleaved_sinusoidal


class TubeletConfig(TransformerEncoderConfig):
    """Three-dimensional patches, then a transformer over all of them.

    Source: VideoMAE, arXiv 2203.12602, section 3.3 (``joint``); TimeSformer, arXiv 2102.05095, section 3 (``divided``:
    here blocks alternate, even ones attend over time, odd ones over space, where TimeSformer does both in each block).
    An odd last frame is completed by a blank one.
    """

    use: Literal["tubelet"] = "tubelet"
    modality: ClassVar[str] = "video"
    image_size: int = Field(default=64, ge=1)
    """Side of a square frame in pixels."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a tubelet in pixels."""
    tubelet_size: int = Field(default=2, ge=1)
    """Frames of a tubelet."""
    attention: Literal["joint", "divided"] = "joint"
    """All tubelets at once, or over time and over space in turn (then ``depth`` is at least 2)."""
    positions: Literal["grid", "sequence"] = "grid"
    """Fixed codes of step, row and column, or of the place in the whole sequence of tubelets (VideoMAE's weights)."""
    key_bias: bool = True
    """Whether the keys of the attention have a bias as queries and values do; VideoMAE's have none."""
    norm: Literal["features", "pooled", "none"] = "features"
    """What is normalised at the end: the features, and so what is pooled; only the pooled vector (VideoMAE fine-tuned
    with mean pooling); or nothing."""
    pool: Literal["mean", "first"] = "mean"
    """The pooled vector: the mean of the features, or the first of them."""
    num_frames: int = Field(default=8, ge=1)
    """Frames that the default reader takes; the encoder itself takes any number."""

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config."""
        config = super().stack(depth, final_norm and self.norm == "features")
        return config if self.key_bias else config.model_copy(update={"key_bias": False})

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % 4 or self.width < 8:
            raise ValueError(f"found width {self.width}, expected a multiple of 4, at least 8")
        if self.attention == "divided" and self.depth < 2:
            raise ValueError(f"divided attention needs a depth of at least 2, found {self.depth}")
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
        """``ceil(length / tubelet_size)`` steps of ``grid ** 2`` patches, in time order."""
        return shortened(length, self.tubelet_size) * self.grid**2

    def default_reader(self) -> VideoReaderConfig:
        """Frames of this size."""
        return VideoReaderConfig(num_frames=self.num_frames, size_px=self.image_size)

    def build(self) -> TubeletEncoder:
        """The module."""
        return TubeletEncoder(self)


class TubeletEncoder(Encoder):
    """See :class:`TubeletConfig`."""

    config: TubeletConfig
    space_PD: Tensor

    def __init__(self, config: TubeletConfig) -> None:
        super().__init__()
        self.config = config
        size = config.tubelet_size * 3 * config.patch_size**2
        self.tubelet_proj = nn.Linear(size, config.width)
        self.register_buffer("space_PD", sincos_2d(config.grid, config.grid, config.width), persistent=False)
        self.transformer = Transformer(config.stack())
        self.pooled_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm == "pooled" else None
        initialise(self.tubelet_proj, 1)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode frames ``[U, L, 3, S, S]``."""
        self.require_shape(values)
        x_UTPD = self._embed(self.cut(values, lengths_U))
        steps, patches = x_UTPD.shape[1:3]
        size = self.config.tubelet_size
        is_valid_UT = valid_mask((lengths_U + size - 1) // size, steps)
        is_valid_UN = is_valid_UT.repeat_interleave(patches, dim=1)
        if self.config.attention == "joint":
            x_UND = self.transformer(x_UTPD.flatten(1, 2), Layout.padded(is_valid_UN, causal=False))
        else:
            x_UND = self._divided(x_UTPD, is_valid_UT)
        features = finish(x_UND, is_valid_UN, x_UND[:, 0] if self.config.pool == "first" else None)
        if self.pooled_norm is None:
            return features
        return Features(features.x_UND, features.is_valid_UN, self.pooled_norm(features.pooled_UD))

    def visible(self, tubelets_UTPC: Tensor, is_masked_UN: Tensor) -> Tensor:
        """Encode the tubelets that are not masked, and only them (arXiv 2203.12602, section 3.3).

        Args:
            tubelets_UTPC: from :meth:`cut`, of videos of one length.
            is_masked_UN: bool; as many masked ones in every video.

        Returns:
            Their features ``[U, V, D]`` in order.
        """
        x_UND = self._embed(tubelets_UTPC).flatten(1, 2)
        x_UVD = x_UND[~is_masked_UN].view(len(x_UND), -1, x_UND.shape[2])
        states_UVD: Tensor = self.transformer(x_UVD, Layout(causal=False))
        return states_UVD

    def _embed(self, tubelets_UTPC: Tensor) -> Tensor:
        x_UTPD: Tensor = self.tubelet_proj(tubelets_UTPC)
        steps, patches, width = x_UTPD.shape[1:]
        if self.config.positions == "sequence":
            codes = interleaved_sinusoidal(steps * patches, width, device=x_UTPD.device).to(x_UTPD)
            return x_UTPD + codes.view(steps, patches, width)
        return x_UTPD + self.space_PD + sinusoidal(steps, width, device=x_UTPD.device).to(x_UTPD)[:, None]

    def cut(self, values: Tensor, lengths_U: Tensor) -> Tensor:
        """Frames to flat tubelets ``[U, T, P, 3 * frames * patch * patch]``, channel by channel."""
        config = self.config
        values = values * valid_mask(lengths_U, values.shape[1])[:, :, None, None, None]
        missing = -values.shape[1] % config.tubelet_size
        if missing:
            values = nn.functional.pad(values, (0, 0, 0, 0, 0, 0, 0, missing))
        num_units, length = values.shape[:2]
        steps, grid, patch = length // config.tubelet_size, config.grid, config.patch_size
        cut = values.view(num_units, steps, config.tubelet_size, 3, grid, patch, grid, patch)
        return cut.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(num_units, steps, grid**2, -1)

    def _divided(self, x_UTPD: Tensor, is_valid_UT: Tensor) -> Tensor:
        num_units, steps, patches, width = x_UTPD.shape
        time = Layout.padded(is_valid_UT.repeat_interleave(patches, dim=0), causal=False)
        space = Layout(causal=False)
        stack = self.transformer
        for layer in range(len(stack.blocks)):
            if layer % 2 == 0:
                rows = x_UTPD.transpose(1, 2).reshape(num_units * patches, steps, width)
                rows = stack.run_block(layer, rows, stack.step(rows, time))
                x_UTPD = rows.view(num_units, patches, steps, width).transpose(1, 2)
            else:
                rows = x_UTPD.reshape(num_units * steps, patches, width)
                rows = stack.run_block(layer, rows, stack.step(rows, space))
                x_UTPD = rows.view(num_units, steps, patches, width)
        x_UND: Tensor = x_UTPD.reshape(num_units, steps * patches, width)
        if stack.final_norm is not None:
            x_UND = stack.final_norm(x_UND)
        return x_UND
