"""A small residual convolutional network. Legend: ``U`` images, ``N`` places of the last grid, ``D`` width."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.modalities.image import ImageReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, Pool, all_valid
from polymodal.models.layers.convolution import shortened
from polymodal.models.layers.positions import grid_codes

CHANNELS_LAST = torch.channels_last
"""Layout of the convolutions' inputs: a quarter faster than channels first, measured on a CPU."""


class CnnConfig(EncoderConfig):
    """A residual network; its features are the places of its last grid.

    A stem of stride 2, then stages of residual blocks; every stage after the first halves the grid and doubles the
    width. Source: arXiv 1512.03385, section 3.3, with group norm (arXiv 1803.08494) in place of batch norm, a 3x3 stem
    and no pooling after it, for small images.
    """

    use: Literal["cnn"] = "cnn"
    modality: ClassVar[str] = "image"
    image_size: int = Field(default=64, ge=1)
    """Side of the square image in pixels."""
    blocks: tuple[int, ...] = Field(default=(1, 1, 1), min_length=1)
    """Residual blocks of each stage."""
    pool: Pool = "max"
    """How the places of the grid become the pooled vector. ``max`` by default: a small object is on few places, and a
    mean over all of them hides it from objectives on the pooled vector (``docs/log.md``)."""

    @model_validator(mode="after")
    def _width_halves(self) -> Self:
        if self.width % 2 ** (len(self.blocks) - 1):
            raise ValueError(f"width {self.width} cannot be halved {len(self.blocks) - 1} times for the earlier stages")
        if min(self.blocks) < 1:
            raise ValueError(f"found blocks {self.blocks}, expected at least 1 in each stage")
        return self

    @property
    def grid(self) -> int:
        """Places along one side of the last grid."""
        return shortened(self.image_size, 2 ** len(self.blocks))

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """One per place of the last grid."""
        return self.grid**2

    def default_reader(self) -> ImageReaderConfig:
        """Images of this size."""
        return ImageReaderConfig(size_px=self.image_size)

    def build(self) -> Cnn:
        """The module."""
        return Cnn(self)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = group_norm(out_channels)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """``[U, C, H, W]`` to ``[U, C', H / stride, W / stride]``."""
        # A group norm's gradient does not need what it gave, so that it may be overwritten.
        branch: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu_()))
        return branch.add_(x if self.shortcut is None else self.shortcut(x)).relu_()


class Cnn(Encoder):
    """See :class:`CnnConfig`."""

    config: CnnConfig
    positions_ND: Tensor

    def __init__(self, config: CnnConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width // 2 ** (len(config.blocks) - 1 - stage) for stage in range(len(config.blocks))]
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), group_norm(widths[0]), nn.ReLU())
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, (count, width) in enumerate(zip(config.blocks, widths, strict=True)):
            for index in range(count):
                layers.append(ResidualBlock(channels, width, 2 if stage and index == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*layers)
        # What rectifiers give is positive and of any size; a connector learns from centred features of one size.
        self.final_norm = nn.LayerNorm(config.width)
        self.register_buffer("positions_ND", grid_codes(config.grid, config.width), persistent=False)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode images ``[U, 3, S, S]``."""
        self.require_shape(values, ragged=False)
        x = self.stem(values.contiguous(memory_format=CHANNELS_LAST))
        x_UND = self.final_norm(self.stages(x).flatten(2).transpose(1, 2))
        # Pooled without the places: the maximum of a code says nothing, and the mean of all codes is zero.
        pooled_UD = x_UND.amax(dim=1) if self.config.pool == "max" else None
        return all_valid(x_UND + self.positions_ND, pooled_UD)


def group_norm(channels: int) -> nn.GroupNorm:
    """A group norm of eight groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)
