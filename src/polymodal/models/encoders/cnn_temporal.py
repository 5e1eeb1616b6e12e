"""A residual network over frames that looks at neighbouring frames between its stages.

Legend: ``U`` videos, ``L`` frames, ``C`` channels, ``H`` and ``W`` of a grid, ``N`` features, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import conv2d

from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, Pool, finish, pool_max
from polymodal.models.encoders.cnn import CHANNELS_LAST, ResidualBlock, group_norm
from polymodal.models.layers.convolution import shortened, valid_mask
from polymodal.models.layers.positions import grid_codes


class CnnTemporalConfig(EncoderConfig):
    """A small (2+1)-dimensional residual network; features are the places of its last grids, in time order.

    Every stage is a spatial residual block followed by a residual convolution over three neighbouring frames at each
    place; stages after the first halve the grid and double the width. After the last one the maximum of every two
    frames is kept, so that what a single frame shows for a moment is still there.

    Source: R(2+1)D, arXiv 1711.11248, section 3.5; maximum over frames as in C3D, arXiv 1412.0767, section 3.2.
    Deviations: the temporal convolution is a residual branch of its own; group norm per frame, so that neither padding
    nor other videos change a feature.
    """

    use: Literal["cnn_temporal"] = "cnn_temporal"
    modality: ClassVar[str] = "video"
    image_size: int = Field(default=64, ge=1)
    """Side of a square frame in pixels."""
    stages: int = Field(default=3, ge=1, le=6)
    """Spatial stages; the last grid has ``image_size / 2 ** stages`` places along a side."""
    num_frames: int = Field(default=8, ge=1)
    """Frames that the default reader takes; the encoder itself takes any number."""
    pool: Pool = "max"
    """How features become the pooled vector; ``max`` keeps what few places show."""

    @model_validator(mode="after")
    def _width_halves(self) -> Self:
        if self.width % 2 ** (self.stages - 1):
            raise ValueError(f"width {self.width} cannot be halved {self.stages - 1} times for the earlier stages")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which the codes of rows and columns need")
        return self

    @property
    def grid(self) -> int:
        """Places along one side of the last grid."""
        return shortened(self.image_size, 2**self.stages)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``: one frame."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """``ceil(length / 2)`` steps of ``grid ** 2`` places."""
        return shortened(length, 2) * self.grid**2

    def default_reader(self) -> VideoReaderConfig:
        """Frames of this size."""
        return VideoReaderConfig(num_frames=self.num_frames, size_px=self.image_size)

    def build(self) -> CnnTemporal:
        """The module."""
        return CnnTemporal(self)


class TemporalMix(nn.Module):
    """``x + gain * relu(norm(conv over frames t-1, t, t+1)))`` at each place; frames outside the video count as zeros.

    The gain starts near zero: at first every frame is seen almost as an image, so that the weights of an image network
    of the same widths are a good start (inflation, arXiv 1705.07750, section 2.3).

    Args:
        channels: ``C``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3 * channels, channels, 1, bias=False)
        self.norm = group_norm(channels)
        self.gain_C = nn.Parameter(torch.full((channels,), 1e-3))

    def forward(self, x_ULCHW: Tensor, is_valid_UL: Tensor | None) -> Tensor:
        """Same shape; padding frames count as zeros. ``is_valid_UL`` is None where there are none."""
        if is_valid_UL is not None:
            x_ULCHW = x_ULCHW * is_valid_UL[:, :, None, None, None]
        size, channels = x_ULCHW.shape[3:], x_ULCHW.shape[2]
        # Frames are the rows of a picture whose columns are the places: a 3x1 convolution, and no frame is copied.
        weight = (
            self.conv.weight.view(-1, 3, channels).transpose(1, 2)[..., None].contiguous(memory_format=CHANNELS_LAST)
        )
        around = conv2d(x_ULCHW.transpose(1, 2).flatten(3), weight, padding=(1, 0)).transpose(1, 2)
        branch: Tensor = self.norm(torch.unflatten(around.flatten(0, 1), -1, size)).relu_()
        return torch.addcmul(x_ULCHW, branch.view_as(x_ULCHW), self.gain_C[:, None, None])


def pool_pairs(x_ULCHW: Tensor, is_valid_UL: Tensor) -> Tensor:
    """The maximum of frames 2i and 2i + 1 ``[U, ceil(L / 2), C, H, W]``; a frame without a valid second stays."""
    first, second = x_ULCHW[:, ::2], x_ULCHW[:, 1::2]
    paired, alone = first[:, : second.shape[1]], first[:, second.shape[1] :]
    has_second_UL = is_valid_UL[:, 1::2, None, None, None]
    return torch.cat((torch.maximum(paired, second.where(has_second_UL, paired)), alone), dim=1)


class CnnTemporal(Encoder):
    """See :class:`CnnTemporalConfig`."""

    config: CnnTemporalConfig
    positions_ND: Tensor

    def __init__(self, config: CnnTemporalConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width // 2 ** (config.stages - 1 - stage) for stage in range(config.stages)]
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), group_norm(widths[0]), nn.ReLU())
        inputs = [widths[0], *widths[:-1]]
        self.stages = nn.ModuleList(
            ResidualBlock(inside, outside, 2 if stage else 1)
            for stage, (inside, outside) in enumerate(zip(inputs, widths, strict=True))
        )
        self.temporal = nn.ModuleList(TemporalMix(width) for width in widths)
        # As in the image network: centred features of one size that know their place.
        self.final_norm = nn.LayerNorm(config.width)
        self.register_buffer("positions_ND", grid_codes(config.grid, config.width), persistent=False)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode videos ``[U, L, 3, S, S]``."""
        self.require_shape(values)
        num_videos, num_frames = values.shape[:2]
        is_valid_UL = valid_mask(lengths_U, num_frames)
        padded_UL = None if bool(is_valid_UL.all()) else is_valid_UL
        x = self.stem(values.flatten(0, 1).contiguous(memory_format=CHANNELS_LAST))
        for spatial, temporal in zip(self.stages, self.temporal, strict=True):
            x = spatial(x).unflatten(0, (num_videos, num_frames))
            x = temporal(x, padded_UL).flatten(0, 1)
        x_ULCHW = pool_pairs(x.unflatten(0, (num_videos, num_frames)), is_valid_UL)
        is_kept_UL = is_valid_UL[:, ::2]
        x_ULND = self.final_norm(x_ULCHW.flatten(3).transpose(2, 3))
        is_valid_UN = is_kept_UL.repeat_interleave(self.config.grid**2, dim=1)
        # Pooled without the places: the maximum of a code says nothing, and the mean of all codes is zero.
        pooled_UD = pool_max(x_ULND.flatten(1, 2), is_valid_UN) if self.config.pool == "max" else None
        return finish((x_ULND + self.positions_ND).flatten(1, 2), is_valid_UN, pooled_UD)
