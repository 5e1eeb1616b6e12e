"""Arrangements: the tokens of an item's units -> the item's sequence, its length known from the header.

Legend: ``M`` tokens of a unit, ``T`` tokens of the item, ``h w`` grid of tokens, ``D`` width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from polymodal.core.batch import TileLengths
from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.models.connectors.base import side_of

_MAY_EXCEED = 1.1
"""Up to this factor of a side, a grid of tokens may be larger than ``max_tiles`` without being scaled."""


class ArrangementConfig(Config, ABC):
    """Base of the arrangement configs; a variant adds ``use`` and its own fields."""

    modality: ClassVar[str]

    @abstractmethod
    def num_tokens(self, counts: Sequence[int], lengths: tuple[int, ...]) -> int:
        """How many tokens an item becomes; exact.

        Args:
            counts: tokens of each of its units.
            lengths: of its units, as the reader measured them.

        Raises:
            ConfigError: if the units cannot be arranged.
        """

    @abstractmethod
    def build(self, width: int) -> Arrangement:
        """The module for tokens of ``width``, with new random weights."""


class Arrangement(nn.Module, ABC):
    """Base of the arrangements; ``newline``: the learned token that ends rows or items.

    Args:
        width: of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5)

    @abstractmethod
    def forward(self, units: Sequence[Tensor], lengths: tuple[int, ...]) -> Tensor:
        """The item's tokens ``[T, D]`` from the valid tokens ``[M, D]`` of each unit."""


class PooledFramesConfig(ArrangementConfig):
    """The grid of tokens of each frame scaled down, bilinearly, frame by frame; a learned token ends the video.

    Source: LLaVA-OneVision, arXiv 2408.03326, section 3.2.
    """

    modality: ClassVar[str] = "video"

    use: Literal["pooled_frames"] = "pooled_frames"
    factor: PositiveInt = 2
    """So many times fewer rows and columns, rounded up."""

    def num_tokens(self, counts: Sequence[int], lengths: tuple[int, ...]) -> int:
        """Those of each frame's smaller grid, and one."""
        return sum(frames * self.side(count, frames) ** 2 for count, frames in zip(counts, lengths, strict=True)) + 1

    def side(self, count: int, frames: int) -> int:
        """Side of a frame's smaller grid, of a video with ``count`` tokens before."""
        return -(-side_of(count, count // frames) // self.factor)

    def build(self, width: int) -> Arrangement:
        """The module."""
        return PooledFrames(self, width)


class PooledFrames(Arrangement):
    """See :class:`PooledFramesConfig`."""

    def __init__(self, config: PooledFramesConfig, width: int) -> None:
        super().__init__(width)
        self.config = config

    def forward(self, units: Sequence[Tensor], lengths: tuple[int, ...]) -> Tensor:
        """See :meth:`Arrangement.forward`."""
        parts = []
        for x_MD, frames in zip(units, lengths, strict=True):
            before, after = side_of(len(x_MD), len(x_MD) // frames), self.config.side(len(x_MD), frames)
            grids_LDhw = x_MD.view(frames, before, before, -1).permute(0, 3, 1, 2)
            pooled = nn.functional.interpolate(grids_LDhw, (after, after), mode="bilinear")
            parts.append(pooled.permute(0, 2, 3, 1).flatten(0, 2))
        return torch.cat((*parts, self.newline.to(units[0].dtype)[None]))


class TileRowsConfig(ArrangementConfig):
    """The tiles of a picture put together to one grid of tokens, row by row, with a learned token ending each row.

    The tokens of the whole picture (the thumbnail) come first. Rows or columns that hold nothing but padding, as the
    picture's proportions say, are left out. A picture that is one unit is its tokens and one learned token.

    Source: LLaVA-NeXT (Liu et al. 2024), ``spatial_unpad``; ``max_tiles``: LLaVA-OneVision, arXiv 2408.03326, section
    3.2 (AnyRes-9).
    """

    modality: ClassVar[str] = "image"

    use: Literal["tile_rows"] = "tile_rows"
    max_tiles: PositiveInt | None = None
    """A grid of tokens that is larger than so many tiles is scaled down to them, bilinearly; None: never."""

    def num_tokens(self, counts: Sequence[int], lengths: tuple[int, ...]) -> int:
        """Those of the whole picture, and of the grid without padding, scaled, with one more for each row."""
        if len(counts) == 1:
            return counts[0] + 1
        first, side = self._first(counts, lengths), side_of(counts[-1], None)
        assert isinstance(lengths, TileLengths)
        height, width = self.scaled(*_kept(lengths.grid, side, lengths.size_px), side)
        return sum(counts[:first]) + height * (width + 1)

    def _first(self, counts: Sequence[int], lengths: tuple[int, ...]) -> int:
        """How many units stand before those of the grid."""
        if not isinstance(lengths, TileLengths) or len(set(counts)) != 1:
            raise ConfigError(
                f"arrange tile_rows: found units of {list(counts)} tokens from a reader that cuts no tiles, expected "
                "an image reader with resolution: anyres or tiles"
            )
        return len(counts) - lengths.grid[0] * lengths.grid[1]

    def scaled(self, height: int, width: int, side: int) -> tuple[int, int]:
        """Rows and columns of tokens after scaling, of tiles with ``side`` x ``side`` tokens."""
        if self.max_tiles is None:
            return height, width
        ratio = math.sqrt(height * width / (self.max_tiles * side**2))
        if ratio <= _MAY_EXCEED:
            return height, width
        return max(1, int(height // ratio)), max(1, int(width // ratio))

    def build(self, width: int) -> Arrangement:
        """The module."""
        return TileRows(self, width)


class TileRows(Arrangement):
    """See :class:`TileRowsConfig`."""

    def __init__(self, config: TileRowsConfig, width: int) -> None:
        super().__init__(width)
        self.config = config

    def forward(self, units: Sequence[Tensor], lengths: tuple[int, ...]) -> Tensor:
        """See :meth:`Arrangement.forward`."""
        end = self.newline.to(units[0].dtype)
        if len(units) == 1:
            return torch.cat((units[0], end[None]))
        first, side = self.config._first([len(unit) for unit in units], lengths), side_of(len(units[-1]), None)
        assert isinstance(lengths, TileLengths)
        rows, cols = lengths.grid
        tiles = torch.stack(list(units[first:])).view(rows, cols, side, side, -1)
        grid_hwD = tiles.transpose(1, 2).reshape(rows * side, cols * side, -1)
        height, width = _kept(lengths.grid, side, lengths.size_px)
        top, left = (rows * side - height) // 2, (cols * side - width) // 2
        grid_hwD = grid_hwD[top : top + height, left : left + width]
        size = self.config.scaled(height, width, side)
        if size != (height, width):
            scaled = nn.functional.interpolate(grid_hwD.permute(2, 0, 1)[None], size, mode="bilinear")
            grid_hwD = scaled[0].permute(1, 2, 0)
        grid_hwD = torch.cat((grid_hwD, end.expand(len(grid_hwD), 1, -1)), dim=1)
        return torch.cat((*units[:first], grid_hwD.flatten(0, 1)))


def _kept(grid: tuple[int, int], side: int, size_px: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens that show the picture, which stands scaled in the middle of the grid.

    Worked example: 300 x 100 pixels on 2 x 2 tiles of 24 x 24 tokens: 16 rows would show it, and as many are left out
    above as below, so that (16, 48) are kept.
    """
    height, width = grid[0] * side, grid[1] * side
    width_px, height_px = size_px
    if width_px / height_px > width / height:
        shown = int(round(height_px * (width / width_px), 7))
        return height - (height - shown) // 2 * 2, width
    shown = int(round(width_px * (height / height_px), 7))
    return height, width - (width - shown) // 2 * 2
