"""One vector for a whole cloud. Legend: ``U`` clouds, ``L`` points, ``C`` channels, ``D`` width."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.modalities.points import PointsReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, all_valid
from polymodal.models.layers.convolution import valid_mask


class PointnetConfig(EncoderConfig):
    """The same MLP on every point, then the maximum over points: one feature.

    Source: PointNet, arXiv 1612.00593, section 4.2. Deviations: no alignment networks; layer in place of batch norm.
    """

    use: Literal["pointnet"] = "pointnet"
    modality: ClassVar[str] = "points"
    hidden: tuple[int, ...] = (64, 128)
    """Widths of the layers before the last."""
    colour: bool = True
    """Whether points carry rgb after xyz."""
    num_points: int = Field(default=512, ge=1)
    """Points that the default reader takes; the encoder itself takes any number."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(6,)`` with colour, else ``(3,)``."""
        return (6 if self.colour else 3,)

    def num_features(self, length: int) -> int:
        """One."""
        return 1

    def default_reader(self) -> PointsReaderConfig:
        """Clouds of at most ``num_points`` points."""
        return PointsReaderConfig(num_points=self.num_points, colour=self.colour)

    def build(self) -> Pointnet:
        """The module."""
        return Pointnet(self)


class Pointnet(Encoder):
    """See :class:`PointnetConfig`."""

    def __init__(self, config: PointnetConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = config.unit_shape[0]
        for hidden in config.hidden:
            layers += [nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU()]
            channels = hidden
        self.point = nn.Sequential(*layers, nn.Linear(channels, config.width))
        self.whole = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.width),
            nn.ReLU(),
            nn.Linear(config.width, config.width),
        )

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode clouds ``[U, L, C]``."""
        self.require_shape(values)
        outside_UL1 = ~valid_mask(lengths_U, values.shape[1])[..., None]
        x_ULD = self.point(values).masked_fill(outside_UL1, -torch.inf)
        return all_valid(self.whole(x_ULD.amax(dim=1, keepdim=True)))
