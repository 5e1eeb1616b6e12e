"""Fitting pictures to a canvas, and from 8-bit pixels to normalised model input.

Shapes: ``H W`` picture, ``h w`` canvas.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray

Fit = Literal["stretch", "crop", "pad"]
"""How a picture meets a canvas of another shape: ``stretch`` changes its proportions, ``crop`` keeps the middle that
fills the canvas, ``pad`` keeps all of it and fills the rest with the mean colour (zeros after normalisation)."""

_BICUBIC = PIL.Image.Resampling.BICUBIC


def fit_to_canvas(
    pixels_HW3: NDArray[np.uint8],
    canvas_px: tuple[int, int],
    fit: Fit,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> NDArray[np.float32]:
    """Resize (bicubic, antialiased), place and normalise.

    Args:
        pixels_HW3: uint8 RGB.
        canvas_px: rows and columns of the result.
        fit: what to do where the proportions differ.
        mean: per channel, of pixels in 0..1.
        std: per channel.

    Returns:
        float32 ``[3, h, w]``: ``(pixel / 255 - mean) / std``.
    """
    height, width = canvas_px
    if fit == "pad":
        inner_h, inner_w = _inside(pixels_HW3.shape[:2], canvas_px)
        resized = _resize(pixels_HW3, (inner_h, inner_w), None)
        canvas = np.zeros((3, height, width), np.float32)
        top, left = (height - inner_h) // 2, (width - inner_w) // 2
        canvas[:, top : top + inner_h, left : left + inner_w] = normalised(resized, mean, std)
        return canvas
    box = _crop_box(pixels_HW3.shape[:2], canvas_px) if fit == "crop" else None
    return normalised(_resize(pixels_HW3, canvas_px, box), mean, std)


def normalised(
    pixels_HW3: NDArray[np.uint8], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> NDArray[np.float32]:
    """``(pixel / 255 - mean) / std`` as float32 ``[3, H, W]``."""
    scale = (1.0 / (255.0 * np.asarray(std))).astype(np.float32)
    offset = (np.asarray(mean) / np.asarray(std)).astype(np.float32)
    result = np.empty((3, *pixels_HW3.shape[:2]), np.float32)
    np.multiply(pixels_HW3.transpose(2, 0, 1), scale[:, None, None], out=result)
    result -= offset[:, None, None]
    return result


def _resize(
    pixels_HW3: NDArray[np.uint8], size_px: tuple[int, int], box: tuple[float, float, float, float] | None
) -> NDArray[np.uint8]:
    if box is None and pixels_HW3.shape[:2] == size_px:
        return pixels_HW3
    image = PIL.Image.fromarray(pixels_HW3).resize((size_px[1], size_px[0]), _BICUBIC, box=box)
    return np.asarray(image)


def _inside(size_px: tuple[int, ...], canvas_px: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the picture scaled to fit the canvas; the tight side fits exactly."""
    height, width = size_px
    scale_h, scale_w = canvas_px[0] / height, canvas_px[1] / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), canvas_px[0]), canvas_px[1]
    return canvas_px[0], min(math.ceil(width * scale_h), canvas_px[1])


def _crop_box(size_px: tuple[int, ...], canvas_px: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of the picture that fills the canvas: (left, top, right, bottom) in source pixels.

    Equal to scaling until the canvas is covered and cutting its centre, the usual order, without ever making the scaled
    picture: a 65,000 x 1 strip would need gigabytes.
    """
    height, width = size_px
    scale = max(canvas_px[0] / height, canvas_px[1] / width)
    cover_h = max(canvas_px[0], int(height * scale))
    cover_w = max(canvas_px[1], int(width * scale))
    top, left = round((cover_h - canvas_px[0]) / 2), round((cover_w - canvas_px[1]) / 2)
    step_h, step_w = height / cover_h, width / cover_w
    # rounding may carry the far edge a hair outside, which Pillow refuses
    bottom, right = min((top + canvas_px[0]) * step_h, height), min((left + canvas_px[1]) * step_w, width)
    return left * step_w, top * step_h, right, bottom
