"""The encoder of DALL-E's discrete autoencoder: pictures to scores over a codebook.

Legend: ``U`` pictures, ``N`` places, ``D`` codes, ``S`` side in pixels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import relu

from polymodal.modalities.image import ImageReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, all_valid

_GROUPS = 4
"""Groups of blocks; between them the picture is halved."""


class DvaeConfig(EncoderConfig):
    """Four groups of residual blocks; the features are scores over ``width`` codes, a place's code the largest.

    Source: Ramesh 2102.12092, appendix A.2, in the form of FLAVA, arXiv 2112.04482, section 3.2.
    """

    use: Literal["dvae"] = "dvae"
    modality: ClassVar[str] = "image"
    width: int = Field(default=64, ge=4)
    """Number of codes (8192 in the published one)."""
    base: int = Field(default=32, ge=4)
    """Channels of the first group (256 in the published one); each further one has twice as many."""
    blocks: int = Field(default=2, ge=1)
    """Blocks of each group."""
    image_size: int = Field(default=32, ge=8)
    """Side of the square picture in pixels."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % 8 or self.base % 4:
            raise ValueError(f"expected image_size in steps of 8 and base of 4; found {self.image_size}, {self.base}")
        return self

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """One per 8 x 8 pixels."""
        return (self.image_size // 8) ** 2

    def default_reader(self) -> ImageReaderConfig:
        """Pictures of this size, pixels in 0.1..0.9."""
        return ImageReaderConfig(
            size_px=self.image_size, resample="lanczos", mean=(-0.125, -0.125, -0.125), std=(1.25, 1.25, 1.25)
        )

    def build(self) -> Dvae:
        """The module."""
        return Dvae(self)


class DvaeBlock(nn.Module):
    """A residual block of four convolutions, its result damped.

    Args:
        channels: of the input.
        out: of the output.
        gain: of the residual path.
    """

    def __init__(self, channels: int, out: int, gain: float) -> None:
        super().__init__()
        hidden = out // 4
        self.gain = gain
        self.id_path = nn.Conv2d(channels, out, 1) if channels != out else None
        widths = (channels, hidden, hidden, hidden)
        self.convs = nn.ModuleList(nn.Conv2d(width, hidden, 3, padding=1) for width in widths[:3])
        self.convs.append(nn.Conv2d(hidden, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[U, C, H, W]`` to ``[U, C', H, W]``."""
        branch = x
        for conv in self.convs:
            branch = conv(relu(branch))
        return (x if self.id_path is None else self.id_path(x)) + self.gain * branch


class Dvae(Encoder):
    """See :class:`DvaeConfig`."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        self.config = config
        gain = 1.0 / (_GROUPS * config.blocks) ** 2
        widths = [config.base * scale for scale in (1, 1, 2, 4, 8)]
        self.stem = nn.Conv2d(3, config.base, 7, padding=3)
        self.groups = nn.ModuleList(
            nn.ModuleList(DvaeBlock(inner if place == 0 else outer, outer, gain) for place in range(config.blocks))
            for inner, outer in pairwise(widths)
        )
        self.pool = nn.MaxPool2d(2)
        self.out = nn.Conv2d(widths[-1], config.width, 1)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Score pictures ``[U, 3, S, S]``."""
        self.require_shape(values, ragged=False)
        x = self.stem(values)
        for place, group in enumerate(self.groups):
            x = x if place == 0 else self.pool(x)
            for block in group:  # type: ignore[attr-defined]
                x = block(x)
        return all_valid(self.out(relu(x)).flatten(2).transpose(1, 2))
