"""Fitting pictures to a canvas, and from 8-bit pixels to normalised model input.

Shapes: ``H W`` picture, ``h w`` canvas.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from pydantic import Field

Fit = Literal["stretch", "crop", "pad", "pad_square"]
"""How a picture meets a canvas of another shape: ``stretch`` changes its proportions, ``crop`` keeps the middle that
fills the canvas, ``pad`` scales all of it into the canvas and fills the rest, ``pad_square`` fills the picture up to a
square first and scales that (LLaVA-1.5), so that the borders blend."""

Byte = Annotated[int, Field(ge=0, le=255)]
Fill = Literal["mean", "black"] | tuple[Byte, Byte, Byte]
"""What padding is filled with: the mean colour (zeros after normalisation), black, or a colour of bytes."""

Rounding = Literal["down", "nearest"]
"""Where the middle lies if half a pixel is over, and how large a scaled picture is that is no whole number of pixels.
``down``: the middle begins at the pixel before, and what is padded is rounded up (the processors of ``transformers``).
``nearest``: both to the nearest whole number, halves to the even one (``torchvision``, ``open_clip``, ``timm``)."""

Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
"""How pixels are interpolated; all but ``nearest`` are antialiased."""

_FILTERS = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
_MAX_SURPLUS = 6
"""Up to so many times the canvas, the whole scaled picture is made before its middle is cut: the usual order, to the
bit. Above it, only what is kept."""
_MAX_SQUARE_PX = 8192
"""Side up to which a picture is filled up to a square before it is scaled."""


def fit_to_canvas(
    pixels_HW3: NDArray[np.uint8],
    canvas_px: tuple[int, int],
    fit: Fit,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    resample: Resample = "bicubic",
    shortest_edge_px: int | None = None,
    fill: Fill = "mean",
    rescale: float = 1 / 255,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Resize (antialiased), place and normalise.

    Args:
        pixels_HW3: uint8 RGB.
        canvas_px: rows and columns of the result.
        fit: what to do where the proportions differ.
        mean: per channel, of rescaled pixels.
        std: per channel.
        resample: how pixels are interpolated.
        shortest_edge_px: for ``crop``, the shorter side of the scaled picture that the canvas is cut from; None: the
            least that covers the canvas.
        fill: what padding is filled with.
        rescale: factor of a pixel.
        out: float32 ``[3, h, w]`` to write the result into; None: a new array.

    Returns:
        float32 ``[3, h, w]``: ``(pixel * rescale - mean) / std``.
    """
    height, width = canvas_px
    if fit == "pad_square" and max(pixels_HW3.shape[:2]) > _MAX_SQUARE_PX:
        fit = "pad"  # the blend of a border is not worth the gigabytes that the square of a strip would need
    if fit == "pad":
        inner_h, inner_w = _inside(pixels_HW3.shape[:2], canvas_px)
        resized = _resize(pixels_HW3, (inner_h, inner_w), None, resample)
        canvas = np.empty((3, height, width), np.float32) if out is None else out
        canvas[:] = 0
        if fill != "mean":
            colour = np.asarray(filling(fill, mean, rescale)) * rescale
            canvas += ((colour - np.asarray(mean)) / np.asarray(std)).astype(np.float32)[:, None, None]
        top, left = (height - inner_h) // 2, (width - inner_w) // 2
        normalised(resized, mean, std, rescale, canvas[:, top : top + inner_h, left : left + inner_w])
        return canvas
    if fit == "crop":
        return normalised(_cropped(pixels_HW3, canvas_px, shortest_edge_px, resample), mean, std, rescale, out)
    if fit == "pad_square":
        pixels_HW3 = _squared(pixels_HW3, filling(fill, mean, rescale))
    return normalised(_resize(pixels_HW3, canvas_px, None, resample), mean, std, rescale, out)


def fit_to_nearest(
    pixels_HW3: NDArray[np.uint8],
    canvas_px: tuple[int, int],
    fit: Literal["crop", "pad"],
    colour: tuple[int, ...],
    *,
    resample: Resample = "bicubic",
    shortest_edge_px: int | None = None,
) -> NDArray[np.uint8]:
    """Resize and place as ``torchvision`` does, whose halves go to the nearest even pixel: see :data:`Rounding`.

    Worked example: of 7 columns, the middle 4 begin at column 2 (1.5 rounded); rounded down, they begin at column 1.

    Source: ``Resize`` and ``CenterCrop`` of torchvision; for ``pad``, ``ResizeKeepRatio``, ``CenterCropOrPad`` of timm.

    Args:
        pixels_HW3: uint8 RGB.
        canvas_px: rows and columns of the result.
        fit: ``crop`` or ``pad``.
        colour: of the padding, bytes.
        resample: how pixels are interpolated.
        shortest_edge_px: see :func:`fit_to_canvas`.

    Returns:
        uint8 ``[h, w, 3]``.
    """
    if fit == "crop":
        return _cropped(pixels_HW3, canvas_px, shortest_edge_px, resample, "nearest")
    height, width = pixels_HW3.shape[:2]
    ratio = max(height / canvas_px[0], width / canvas_px[1])
    inner = max(1, round(height / ratio)), max(1, round(width / ratio))
    canvas = np.empty((*canvas_px, 3), np.uint8)
    canvas[:] = colour
    top, left = (canvas_px[0] - inner[0]) // 2, (canvas_px[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = _resize(pixels_HW3, inner, None, resample)
    return canvas


def filling(fill: Fill, mean: tuple[float, float, float], rescale: float) -> tuple[int, ...]:
    """The bytes of a colour that padding is filled with."""
    if isinstance(fill, tuple):
        return fill
    return (0, 0, 0) if fill == "black" else tuple(int(value / rescale) for value in mean)


def normalised(
    pixels_HW3: NDArray[np.uint8],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    rescale: float = 1 / 255,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """``(pixel * rescale - mean) / std`` as float32 ``[3, H, W]``, in ``out`` if it is given."""
    scale = (rescale / np.asarray(std)).astype(np.float32)
    offset = (np.asarray(mean) / np.asarray(std)).astype(np.float32)
    result: NDArray[np.float32] = np.empty((3, *pixels_HW3.shape[:2]), np.float32) if out is None else out
    np.multiply(pixels_HW3.transpose(2, 0, 1), scale[:, None, None], out=result)
    result -= offset[:, None, None]
    return result


def _resize(
    pixels_HW3: NDArray[np.uint8],
    size_px: tuple[int, int],
    box: tuple[float, float, float, float] | None,
    resample: Resample,
) -> NDArray[np.uint8]:
    if box is None and pixels_HW3.shape[:2] == size_px:
        return pixels_HW3
    image = PIL.Image.fromarray(pixels_HW3).resize((size_px[1], size_px[0]), _FILTERS[resample], box=box)
    return np.asarray(image)


def _squared(pixels_HW3: NDArray[np.uint8], colour: tuple[int, ...]) -> NDArray[np.uint8]:
    """The picture in the middle of a square of one colour."""
    height, width = pixels_HW3.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = colour
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels_HW3
    return square


def _cropped(
    pixels_HW3: NDArray[np.uint8],
    canvas_px: tuple[int, int],
    shortest_edge_px: int | None,
    resample: Resample,
    rounding: Rounding = "down",
) -> NDArray[np.uint8]:
    """Scaled until the canvas is covered, then the middle."""
    cover = _cover(pixels_HW3.shape[:2], canvas_px, shortest_edge_px)
    top, left = (
        surplus // 2 if rounding == "down" else round(surplus / 2)
        for surplus in (cover[0] - canvas_px[0], cover[1] - canvas_px[1])
    )
    if cover[0] * cover[1] <= _MAX_SURPLUS * canvas_px[0] * canvas_px[1]:
        scaled = _resize(pixels_HW3, cover, None, resample)
        return scaled[top : top + canvas_px[0], left : left + canvas_px[1]]
    # The same without ever making the scaled picture: of a 65,000 x 1 strip it would need gigabytes.
    height, width = pixels_HW3.shape[:2]
    step_h, step_w = height / cover[0], width / cover[1]
    # rounding may carry the far edge a hair outside, which Pillow refuses
    bottom, right = min((top + canvas_px[0]) * step_h, height), min((left + canvas_px[1]) * step_w, width)
    return _resize(pixels_HW3, canvas_px, (left * step_w, top * step_h, right, bottom), resample)


def _inside(size_px: tuple[int, ...], canvas_px: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the picture scaled to fit the canvas; the tight side fits exactly."""
    height, width = size_px
    scale_h, scale_w = canvas_px[0] / height, canvas_px[1] / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), canvas_px[0]), canvas_px[1]
    return canvas_px[0], min(math.ceil(width * scale_h), canvas_px[1])


def _cover(size_px: tuple[int, ...], canvas_px: tuple[int, int], shortest_edge_px: int | None) -> tuple[int, int]:
    """Rows and columns of the scaled picture that the canvas is cut from."""
    height, width = size_px
    if shortest_edge_px is not None:
        scaled, source = shortest_edge_px, min(height, width)
    elif canvas_px[0] * width >= canvas_px[1] * height:
        scaled, source = canvas_px[0], height
    else:
        scaled, source = canvas_px[1], width
    return max(canvas_px[0], int(scaled * height / source)), max(canvas_px[1], int(scaled * width / source))
