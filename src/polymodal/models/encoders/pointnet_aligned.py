"""PointNet as published: alignment networks, batch norm, one vector for a whole cloud.

Legend: ``U`` clouds, ``L`` points, ``F`` valid points of all clouds, ``C`` channels, ``K`` side of an alignment, ``D``
width.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.modalities.points import PointsReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, all_valid
from polymodal.models.layers.convolution import valid_mask


class PointnetAlignedConfig(EncoderConfig):
    """Each point alone through shared layers, the maximum over points, fully connected layers.

    Source: PointNet, arXiv 1612.00593, section 4.2, figure 2 and supplementary C. Layers are linear, batch norm (over
    real points alone) and rectifier. Colour passes the input alignment by, which turns coordinates.
    """

    use: Literal["pointnet_aligned"] = "pointnet_aligned"
    modality: ClassVar[str] = "points"
    width: int = Field(default=256, ge=4)
    """Width of the last layer, whose vector is the one feature."""
    align: bool = True
    """Whether two small networks turn the points, and the features after ``first``, to a canonical place."""
    first: tuple[int, ...] = Field(default=(64, 64), min_length=1)
    """Widths of the layers before the feature alignment."""
    second: tuple[int, ...] = Field(default=(64, 128, 1024), min_length=1)
    """Widths of the layers after it; the maximum is taken of the last."""
    whole: tuple[int, ...] = (512,)
    """Widths of the layers between the maximum and the last."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the last layer's output (published: 0.3)."""
    colour: bool = False
    """Whether points carry rgb after xyz."""
    num_points: int = Field(default=1024, ge=1)
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

    def build(self) -> PointnetAligned:
        """The module."""
        return PointnetAligned(self)


class Layers(nn.Sequential):
    """Linear, batch norm, rectifier, so many times.

    Args:
        widths: of the input and of every layer's output.
    """

    def __init__(self, *widths: int) -> None:
        parts: list[nn.Module] = []
        for inside, outside in pairwise(widths):
            linear = nn.Linear(inside, outside)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.BatchNorm1d(outside), nn.ReLU()]
        super().__init__(*parts)


class Alignment(nn.Module):
    """A PointNet in small that predicts a matrix by which all points of a cloud are multiplied; at first almost 1.

    Args:
        channels: of its input, the first ``side`` of which are turned.
        side: ``K``.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.point = Layers(channels, 64, 128, 1024)
        self.whole = Layers(1024, 512, 256)
        self.matrix = nn.Linear(256, side * side)
        # Not zeros, as published: through them the layers before would learn nothing in the first step.
        nn.init.normal_(self.matrix.weight, std=1e-3)
        with torch.no_grad():
            self.matrix.bias.copy_(torch.eye(side).flatten())

    def forward(self, x_FC: Tensor, is_valid_UL: Tensor) -> Tensor:
        """Matrices ``[U, K, K]``."""
        pooled_UD = largest(self.point(x_FC), is_valid_UL)
        matrix: Tensor = self.matrix(self.whole(pooled_UD))
        return matrix.view(-1, self.side, self.side)


class PointnetAligned(Encoder):
    """See :class:`PointnetAlignedConfig`."""

    config: PointnetAlignedConfig

    def __init__(self, config: PointnetAlignedConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.unit_shape[0]
        self.input_alignment = Alignment(channels, 3) if config.align else None
        self.first = Layers(channels, *config.first)
        inner = config.first[-1]
        self.feature_alignment = Alignment(inner, inner) if config.align else None
        self.second = Layers(inner, *config.second)
        self.whole = Layers(config.second[-1], *config.whole, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode clouds ``[U, L, C]``."""
        self.require_shape(values)
        is_valid_UL = valid_mask(lengths_U, values.shape[1])
        x_FC = values[is_valid_UL]
        if self.input_alignment is not None:
            turned_F3 = turn(x_FC[:, :3], self.input_alignment(x_FC, is_valid_UL), lengths_U)
            x_FC = torch.cat((turned_F3, x_FC[:, 3:]), dim=1)
        x_FD, penalty = self.first(x_FC), None
        if self.feature_alignment is not None:
            matrix_UKK = self.feature_alignment(x_FD, is_valid_UL)
            x_FD, penalty = turn(x_FD, matrix_UKK, lengths_U), orthogonality(matrix_UKK)
        pooled_UD = largest(self.second(x_FD), is_valid_UL)
        return replace(all_valid(self.dropout(self.whole(pooled_UD))[:, None]), penalty=penalty)


def largest(x_FD: Tensor, is_valid_UL: Tensor) -> Tensor:
    """The largest value of each channel over a cloud's points, ``[U, D]``."""
    x_ULD = x_FD.new_full((*is_valid_UL.shape, x_FD.shape[1]), -torch.inf)
    return x_ULD.index_put((is_valid_UL,), x_FD).amax(dim=1)


def turn(x_FK: Tensor, matrix_UKK: Tensor, lengths_U: Tensor) -> Tensor:
    """Each point times its cloud's matrix."""
    parts = zip(torch.split(x_FK, lengths_U.tolist()), matrix_UKK, strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


def orthogonality(matrix_UKK: Tensor) -> Tensor:
    """``|| I - A A^T ||^2``, the mean over clouds: the published penalty of the feature alignment (weight 0.001)."""
    identity = torch.eye(matrix_UKK.shape[-1], device=matrix_UKK.device)
    return (identity - matrix_UKK @ matrix_UKK.transpose(1, 2)).square().sum(dim=(1, 2)).mean()
