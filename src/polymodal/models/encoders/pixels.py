"""Pixels with codes of their place: what a latent backbone reads of an image.

Legend: ``U`` images, ``G`` side of the grid, ``N = G^2`` features, ``C`` channels, ``D`` width.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.modalities.image import ImageReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, all_valid


class PixelsConfig(EncoderConfig):
    """Every pixel, or place of a convolution, beside a code of its row and column; nothing looks at anything else.

    Source: Perceiver IO, arXiv 2107.14795, section 4.5 and appendix D (three kinds of image input).
    """

    use: Literal["pixels"] = "pixels"
    modality: ClassVar[str] = "image"
    image_size: int = Field(default=32, ge=8)
    """Side of the square image in pixels."""
    stem: Literal["none", "linear", "conv"] = "linear"
    """``none``: a pixel's three values; ``linear``: a linear map of them; ``conv``: a 7x7 convolution of stride 2 and a
    3x3 maximum of stride 2."""
    channels: int = Field(default=64, ge=1)
    """Channels after the stem."""
    positions: Literal["fourier", "learned"] = "fourier"
    """Sines and cosines of row and column at evenly spaced rates, with both numbers; or learned ones, mapped once."""
    bands: int = Field(default=16, ge=1)
    """Rates of the fourier codes, for each axis."""
    resolution: int | None = Field(default=None, ge=2)
    """Places along a side that the fastest rate can tell apart; None: those of the grid."""
    position_width: int = Field(default=64, ge=1)
    """Width of learned codes."""

    @model_validator(mode="before")
    @classmethod
    def _fill_width(cls, data: Any) -> Any:
        """The width follows from the parts that stand side by side."""
        if not isinstance(data, dict):
            return data
        bands, stem = data.get("bands", 16), data.get("stem", "linear")
        codes = 4 * bands + 2 if data.get("positions", "fourier") == "fourier" else data.get("position_width", 64)
        width = codes + (3 if stem == "none" else data.get("channels", 64))
        if data.get("width", width) != width:
            raise ValueError(f"width follows from the other fields and is {width}, found {data['width']}; leave it out")
        return {**data, "width": width}

    @model_validator(mode="after")
    def _grid_is_there(self) -> Self:
        if self.grid < 1:
            raise ValueError(f"image_size {self.image_size} leaves nothing after the stem")
        return self

    @property
    def grid(self) -> int:
        """Places along one side."""
        return self.image_size if self.stem != "conv" else (math.ceil(self.image_size / 2) - 3) // 2 + 1

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """One per place."""
        return self.grid**2

    def default_reader(self) -> ImageReaderConfig:
        """Images of this size."""
        return ImageReaderConfig(size_px=self.image_size)

    def build(self) -> Pixels:
        """The module."""
        return Pixels(self)


class Pixels(Encoder):
    """See :class:`PixelsConfig`."""

    config: PixelsConfig
    codes_ND: Tensor

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config = config
        self.stem: nn.Module = nn.Identity()
        if config.stem == "linear":
            self.stem = nn.Conv2d(3, config.channels, 1)
        elif config.stem == "conv":
            conv = nn.Conv2d(3, config.channels, 7, stride=2, padding=3, bias=False)
            self.stem = nn.Sequential(conv, nn.BatchNorm2d(config.channels), nn.ReLU(), nn.MaxPool2d(3, 2))
        self.learned: nn.Parameter | None = None
        self.position_proj: nn.Linear | None = None
        if config.positions == "learned":
            width = config.position_width
            self.learned = nn.Parameter(torch.randn(config.grid**2, width) * width**-0.5)
            self.position_proj = nn.Linear(width, width)
        else:
            codes = fourier_codes(config.grid, config.bands, config.resolution or config.grid)
            self.register_buffer("codes_ND", codes, persistent=False)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode images ``[U, 3, S, S]``."""
        self.require_shape(values, ragged=False)
        x_UNC = self.stem(values).flatten(2).transpose(1, 2)
        if self.learned is not None and self.position_proj is not None:
            codes_ND = self.position_proj(self.learned)
        else:
            codes_ND = self.codes_ND.to(x_UNC)
        return all_valid(torch.cat((x_UNC, codes_ND.expand(len(x_UNC), -1, -1)), dim=2))


def fourier_codes(side: int, bands: int, resolution: int) -> Tensor:
    """Codes ``[side^2, 4 bands + 2]`` of a square grid in reading order.

    Row and column run from -1 to 1. Their numbers stand first, then sines of both at ``bands`` rates from 1 to
    ``resolution / 2`` half-turns, then cosines.

    Source: Perceiver, arXiv 2103.03206, section 3.2.
    """
    line = torch.linspace(-1.0, 1.0, side)
    places_N2 = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).flatten(0, 1)
    rates = torch.linspace(1.0, resolution / 2, bands)
    angles = math.pi * (places_N2[..., None] * rates).flatten(1)
    return torch.cat((places_N2, angles.sin(), angles.cos()), dim=1)
