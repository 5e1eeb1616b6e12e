"""Connectors that join neighbouring features.

Legend: ``U`` units, ``N`` features, ``M`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.connectors.base import (
    Connector,
    ConnectorConfig,
    masked,
    merge_by_count,
    side_of,
    split_by_count,
)
from polymodal.models.connectors.projections import MLPStack
from polymodal.models.layers.convolution import shortened, valid_mask


class PoolConfig(ConnectorConfig):
    """Means of neighbouring features, then a linear map.

    The last window may be smaller; its mean is over what is there. Source: DeCo, arXiv 2405.20985.
    """

    use: Literal["pool"] = "pool"
    factor: int = Field(default=2, ge=1)
    """Features of a window along each pooled axis."""
    over: Literal["sequence", "grid"] = "sequence"
    """``sequence``: windows of ``factor`` features in order. ``grid``: squares of ``factor`` x ``factor`` of a grid."""
    grid_features: int | None = Field(default=None, ge=1)
    """For ``grid``: features of one grid where a unit holds several (frames of a video); None: a unit is one grid."""

    def num_tokens(self, num_features: int) -> int:
        """``ceil(N / factor)``, or ``ceil(side / factor) ** 2`` for each grid."""
        if self.over == "sequence":
            return shortened(num_features, self.factor)
        side = side_of(num_features, self.grid_features)
        return num_features // max(side * side, 1) * shortened(side, self.factor) ** 2

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module."""
        return Pool(self, in_dim, out_dim)


class Pool(Connector):
    """See :class:`PoolConfig`."""

    def __init__(self, config: PoolConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.config = config
        self.stack = MLPStack(in_dim, out_dim, 1)

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        if self.config.over == "sequence":
            return self._sequence(x_UND, is_valid_UN)
        groups = []
        for count, indices in split_by_count(is_valid_UN):
            side = side_of(count, self.config.grid_features)
            grids = x_UND[indices, :count].reshape(-1, side, side, x_UND.shape[2]).permute(0, 3, 1, 2)
            factor = self.config.factor
            pooled = nn.functional.avg_pool2d(grids, factor, ceil_mode=True, count_include_pad=False)
            tokens = pooled.flatten(2).transpose(1, 2).reshape(len(indices), -1, x_UND.shape[2])
            groups.append((indices, self.stack(tokens)))
        return merge_by_count(groups, len(x_UND), x_UND, self.stack.out_dim)

    def _sequence(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.config.factor
        missing = -x_UND.shape[1] % factor
        x_UND = nn.functional.pad(masked(x_UND, is_valid_UN), (0, 0, 0, missing))
        counts_UM = nn.functional.pad(is_valid_UN, (0, missing)).reshape(len(x_UND), -1, factor).sum(dim=2)
        sums_UMD = x_UND.reshape(len(x_UND), -1, factor, x_UND.shape[2]).sum(dim=2)
        tokens_UMD = self.stack(sums_UMD / counts_UM.clamp(min=1)[..., None])
        num_U = (is_valid_UN.sum(dim=1) + factor - 1) // factor
        is_valid_UM = valid_mask(num_U, tokens_UMD.shape[1])
        return masked(tokens_UMD, is_valid_UM), is_valid_UM


class PixelShuffleConfig(ConnectorConfig):
    """Squares of ``factor`` x ``factor`` features become one wide feature each, then an MLP.

    Source: InternVL 1.5, arXiv 2404.16821, section 3; a single map as in Idefics3, arXiv 2408.12637.
    """

    use: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = Field(default=2, ge=1)
    """Side of the squares; it divides the side of the grid."""
    depth: int = Field(default=1, ge=1)
    """Linear maps, with gelu between."""
    grid_features: int | None = Field(default=None, ge=1)
    """Features of one grid where a unit holds several (frames of a video); None: a unit is one grid."""

    def num_tokens(self, num_features: int) -> int:
        """``N / factor ** 2``.

        Raises:
            ConfigError: if the features are not square grids whose side is a multiple of the factor.
        """
        self.side(num_features)
        return num_features // self.factor**2

    def side(self, num_features: int) -> int:
        """Side of one grid.

        Raises:
            ConfigError: as :meth:`num_tokens` does.
        """
        side = side_of(num_features, self.grid_features)
        if side % self.factor:
            raise ConfigError(
                f"pixel_shuffle: found a grid of {side} x {side}, expected a side that is a multiple of factor "
                f"{self.factor}; change the factor, or use the connector pool"
            )
        return side

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module."""
        return PixelShuffle(self, in_dim, out_dim)


class PixelShuffle(Connector):
    """See :class:`PixelShuffleConfig`."""

    def __init__(self, config: PixelShuffleConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.config = config
        self.stack = MLPStack(in_dim * config.factor**2, out_dim, config.depth)

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        groups, factor, width = [], self.config.factor, x_UND.shape[2]
        for count, indices in split_by_count(is_valid_UN):
            small = self.config.side(count) // factor
            squares = x_UND[indices, :count].reshape(-1, small, factor, small, factor, width).transpose(2, 3)
            groups.append((indices, self.stack(squares.reshape(len(indices), -1, factor * factor * width))))
        return merge_by_count(groups, len(x_UND), x_UND, self.stack.out_dim)
