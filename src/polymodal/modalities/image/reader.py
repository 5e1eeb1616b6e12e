"""The image reader: one picture -> one tile, or several, each ``[3, S, S]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from polymodal.core.batch import ModelInput, TileLengths
from polymodal.core.limits import Limits
from polymodal.core.parts import Image, Part
from polymodal.modalities.decoding import expect_part
from polymodal.modalities.image.decode import decode_image
from polymodal.modalities.image.header import ImageHeader, probe_image
from polymodal.modalities.image.resize import (
    Fill,
    Fit,
    Resample,
    Rounding,
    filling,
    fit_to_canvas,
    fit_to_nearest,
    normalised,
)
from polymodal.modalities.image.tiling import Grid, closest_grid, fullest_grid
from polymodal.modalities.reader import Reader, ReaderConfig

Triple = tuple[float, float, float]


def checked_std(std: Triple) -> Triple:
    """``std`` if every channel is positive.

    Raises:
        ValueError: if one is not: dividing by it would give infinities.
    """
    if min(std) <= 0:
        raise ValueError("expected three positive numbers (pixels are divided by them)")
    return std


class ImageReaderConfig(ReaderConfig):
    """How pictures become tiles.

    Args:
        size_px: side of a tile.
        resolution: ``fixed``: one tile. ``tiles``: the picture is cut along the grid of at most ``max_tiles`` whose
            proportions are closest. ``anyres``: along the one of ``grids`` that keeps most of its pixels.
        resize: how the picture meets the canvas (one tile, or the whole grid) where proportions differ.
        resample: how pixels are interpolated.
        centre_share: the middle square of so much of the shorter side is cut out before anything else (Perceiver IO:
            224 / 256); None: nothing is.
        shortest_edge_px: with ``resize: crop``, the shorter side of the scaled picture that the canvas is cut from (256
            for a canvas of 224); None: the least that covers the canvas.
        rounding: where half a pixel goes with ``crop`` and ``pad``: ``down`` (the processors of ``transformers``), or
            to the ``nearest`` even one (``torchvision``, and with it ``open_clip``, ``timm``). An export to another
            library's layout takes the rounding of that library.
        fill: what ``pad`` and ``pad_square`` fill the rest with; a colour as three bytes.
        max_tiles: upper bound of ``tiles``, the thumbnail not counted.
        keep_tiles: with ``tiles``, the most tiles of the grid that are kept: those whose pixels vary most, in their
            order, so that plain background goes first; the thumbnail, not counted, stays. None: all.
        tiles_by: with ``tiles``, how a budget makes tiles fewer: by a coarser ``grid`` of the whole picture, or by
            ``content``: ``keep_tiles`` of the same grid.
        grids: candidates of ``anyres``, as (rows, columns).
        thumbnail: whether the whole picture, stretched to one tile, comes first: before any ``anyres`` grid, and before
            a ``tiles`` grid of more than one tile.
        cut: ``all`` pictures; or only a ``single`` one of a conversation, where each of several is one tile, filled up
            to a square with the mean colour.
        rescale: factor of a pixel, before mean and deviation; 1 / 255 for pixels in 0..1.
        mean: per channel, of rescaled pixels, subtracted.
        std: per channel, divided by.

    Source: ``tiles``: InternVL 1.5 (Chen et al. 2024), section 3.1, which puts the thumbnail last. ``anyres``:
        LLaVA-NeXT (Liu et al. 2024), with ``resize: pad`` and ``fill: black``.
        ``cut: single``: LLaVA-OneVision (Li et al. 2024), section 3.2.
        ``pad_square``: LLaVA-1.5 (Liu et al. 2023), section 3.
    """

    modality: ClassVar[str] = "image"

    use: Literal["image"] = "image"
    size_px: int = Field(224, ge=1, le=4096)
    resolution: Literal["fixed", "tiles", "anyres"] = "fixed"
    resize: Fit = "stretch"
    resample: Resample = "bicubic"
    centre_share: float | None = Field(None, gt=0, le=1)
    shortest_edge_px: int | None = Field(None, ge=1, le=8192)
    rounding: Rounding = "down"
    fill: Fill = "mean"
    max_tiles: int = Field(6, ge=1, le=256)
    keep_tiles: int | None = Field(None, ge=1, le=256)
    tiles_by: Literal["grid", "content"] = "grid"
    grids: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    thumbnail: bool = True
    cut: Literal["all", "single"] = "all"
    rescale: float = Field(1 / 255, gt=0)
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    _positive_std = field_validator("std")(checked_std)

    @field_validator("grids")
    @classmethod
    def _usable_grids(cls, grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
        if not grids or any(min(grid) < 1 for grid in grids):
            raise ValueError("expected at least one (rows, columns) pair, each number at least 1")
        return grids

    @model_validator(mode="after")
    def _cuts(self) -> Self:
        if self.resolution != "tiles" and (self.keep_tiles is not None or self.tiles_by == "content"):
            raise ValueError(f"keep_tiles and tiles_by belong to resolution: tiles; found {self.resolution}")
        if self.cut == "single" and self.resolution == "fixed":
            raise ValueError("cut: single belongs to resolution: tiles or anyres; found fixed, which cuts nothing")
        return self

    @model_validator(mode="after")
    def _edge_covers(self) -> Self:
        if self.shortest_edge_px is not None and (self.resize != "crop" or self.resolution != "fixed"):
            raise ValueError("'shortest_edge_px' belongs to resize: crop with resolution: fixed")
        if self.shortest_edge_px is not None and self.shortest_edge_px < self.size_px:
            raise ValueError(
                f"shortest_edge_px {self.shortest_edge_px} is below size_px {self.size_px}: "
                "the picture would not cover it"
            )
        return self

    def fit(
        self,
        pixels_HW3: NDArray[np.uint8],
        canvas_px: tuple[int, int],
        fit: Fit,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Pixels as model input on a canvas of these rows and columns, float32 ``[3, h, w]``; in ``out``, if given."""
        if self.rounding == "nearest" and (fit == "crop" or fit == "pad"):
            placed = fit_to_nearest(
                pixels_HW3,
                canvas_px,
                fit,
                filling(self.fill, self.mean, self.rescale),
                resample=self.resample,
                shortest_edge_px=self.shortest_edge_px,
            )
            return normalised(placed, self.mean, self.std, self.rescale, out)
        return fit_to_canvas(
            pixels_HW3,
            canvas_px,
            fit,
            self.mean,
            self.std,
            resample=self.resample,
            shortest_edge_px=self.shortest_edge_px,
            fill=self.fill,
            rescale=self.rescale,
            out=out,
        )


class ImageReader(Reader):
    """Reads pictures; every unit is a tile of length 1."""

    modality = "image"
    is_ragged = False
    config: ImageReaderConfig

    def __init__(self, config: ImageReaderConfig, limits: Limits) -> None:
        super().__init__(config, limits)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, size_px, size_px)``."""
        return (3, self.config.size_px, self.config.size_px)

    def measure(self, part: Part) -> tuple[int, ...]:
        """A 1 for every tile, from the header; of tiled pictures, with where the tiles lie."""
        return self._lengths(probe_image(expect_part(part, Image), self.limits))

    def read(self, part: Part) -> ModelInput:
        """Decode, fit, normalise and cut: float32 ``[3, size_px, size_px]`` tiles, thumbnail first, then row by row."""
        return self._read(part, None)

    def read_into(self, part: Part, rows_U: NDArray[np.float32]) -> ModelInput:
        """See :meth:`Reader.read_into`: a picture of one tile is written where it belongs."""
        return self._read(part, rows_U[0] if len(rows_U) == 1 else None)

    def _read(self, part: Part, row_3SS: NDArray[np.float32] | None) -> ModelInput:
        pixels = decode_image(expect_part(part, Image), self.limits)
        if self.config.centre_share is not None:
            pixels = centre_square(pixels, self.config.centre_share)
        height, width = pixels.shape[:2]
        header = ImageHeader(width, height, "decoded", "RGB")
        grid, has_thumbnail = self._layout(header)
        config, side = self.config, self.config.size_px
        row_3SS = row_3SS if grid == (1, 1) else None
        canvas = config.fit(pixels, (grid[0] * side, grid[1] * side), config.resize, row_3SS)
        units = _cut(canvas, grid, side)
        if config.keep_tiles is not None and config.keep_tiles < len(units):
            units = [units[place] for place in most_varied(units, config.keep_tiles)]
            grid = (1, len(units))
        if has_thumbnail:
            units.insert(0, config.fit(pixels, (side, side), "stretch"))
        is_tiled = config.resolution != "fixed"
        return ModelInput(units, self._lengths(header), grid=grid if is_tiled else None, size_px=(width, height))

    def among(self, count: int) -> Reader:
        """See :meth:`Reader.among`: one tile for each of several pictures where ``cut`` says so."""
        if count < 2 or self.config.cut == "all":
            return self
        one_tile: dict[str, Any] = {"resolution": "fixed", "resize": "pad_square", "fill": "mean", "cut": "all"}
        one_tile |= {"keep_tiles": None, "tiles_by": "grid"}
        return ImageReader(self.config.model_copy(update=one_tile), self.limits)

    def _lengths(self, header: ImageHeader) -> tuple[int, ...]:
        grid, has_thumbnail = self._layout(header)
        kept = self.config.keep_tiles
        if kept is not None and kept < grid[0] * grid[1]:
            # What is kept of a grid has no rows and columns any more.
            grid = (1, kept)
        lengths = (1,) * (grid[0] * grid[1] + has_thumbnail)
        if self.config.resolution == "fixed":
            return lengths
        return TileLengths(lengths, grid, (header.width_px, header.height_px))

    def _layout(self, header: ImageHeader) -> tuple[Grid, bool]:
        config = self.config
        if config.resolution == "tiles":
            grid = closest_grid(header.width_px, header.height_px, config.size_px, config.max_tiles)
            return grid, config.thumbnail and grid != (1, 1)
        if config.resolution == "anyres":
            return fullest_grid(header.width_px, header.height_px, config.size_px, config.grids), config.thumbnail
        return (1, 1), False


def most_varied(tiles: Sequence[NDArray[np.float32]], wanted: int) -> list[int]:
    """The places, ascending, of the tiles ``[3, H, W]`` whose pixels vary most; of equal ones the first.

    The measure is the deviation of each channel over a tile, the mean of the three: 0 for a tile of one colour.
    """
    deviation = [-float(tile.std(axis=(1, 2)).mean()) for tile in tiles]
    return sorted(np.argsort(deviation, kind="stable")[:wanted].tolist())


def centre_square(pixels_HW3: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    """The middle square of ``share`` of the shorter side."""
    height, width = pixels_HW3.shape[:2]
    side = max(1, int(share * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return pixels_HW3[top : top + side, left : left + side]


def _cut(canvas_3HW: NDArray[np.float32], grid: Grid, side: int) -> list[NDArray[np.float32]]:
    rows, cols = grid
    if grid == (1, 1):
        return [canvas_3HW]
    tiles = canvas_3HW.reshape(3, rows, side, cols, side).transpose(1, 3, 0, 2, 4)
    return list(np.ascontiguousarray(tiles).reshape(rows * cols, 3, side, side))
