"""How a large picture is cut into tiles: which grid of rows and columns suits its shape.

Both rules read only the size, so that the number of tiles is known from the header.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Grid = tuple[int, int]
"""Rows and columns of tiles."""


def closest_grid(width_px: int, height_px: int, tile_px: int, max_tiles: int) -> Grid:
    """The grid of at most ``max_tiles`` tiles whose aspect ratio is closest to the picture's.

    Of grids with equal ratio (1x1 and 2x2) the larger is taken if the picture has more than half its pixels.
    Example: 800 x 400 with tiles of 224 and at most 6 gives 1 row and 2 columns.

    Source: Chen et al. 2024, "How Far Are We to GPT-4V?" (InternVL 1.5), section 3.1.
    """
    aspect = width_px / height_px
    candidates = sorted(
        ((rows, cols) for rows in range(1, max_tiles + 1) for cols in range(1, max_tiles // rows + 1)),
        key=lambda grid: (grid[0] * grid[1], grid),
    )
    best, best_gap = (1, 1), math.inf
    for rows, cols in candidates:
        gap = abs(aspect - cols / rows)
        is_tie = gap == best_gap and width_px * height_px > 0.5 * tile_px * tile_px * rows * cols
        if gap < best_gap or is_tie:
            best, best_gap = (rows, cols), gap
    return best


def fullest_grid(width_px: int, height_px: int, tile_px: int, grids: Sequence[Grid]) -> Grid:
    """The grid that keeps the most of the picture's pixels and, among equals, wastes the fewest of its own.

    Kept pixels are those of the picture scaled to fit the grid, never counted above the picture's own number.

    Source: Liu et al. 2024, "LLaVA-NeXT" (AnyRes; ``select_best_resolution`` of its code).
    """

    def score(grid: Grid) -> tuple[int, int]:
        grid_h, grid_w = grid[0] * tile_px, grid[1] * tile_px
        scale = min(grid_w / width_px, grid_h / height_px)
        scaled = int(width_px * scale) * int(height_px * scale)
        kept = min(scaled, width_px * height_px)
        return kept, -(grid_h * grid_w - kept)

    return max(grids, key=score)
