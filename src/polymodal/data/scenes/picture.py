"""The still picture (anti-aliased PNG) and the video (GIF) of a scene.

Legend: H W height and width in px, F frames.
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from polymodal.data.scenes.gif import encode_gif
from polymodal.data.scenes.latent import COLOURS, Scene, Thing
from polymodal.data.scenes.layout import AREAS_PX, NUM_FRAMES, RADII, SIDE_PX, STEP_PX, STEPS

FPS = 8
Array = NDArray[np.float64]
_SUPERSAMPLING = 4
_STAR_WAIST = 0.4687
_CROSS_ARM = 0.26
_BLINK_FRAMES = 2
_NUM_GREYS = 4
_BLACK = _NUM_GREYS + len(COLOURS)
_COLOUR_INDEX = {name: _NUM_GREYS + i for i, name in enumerate(COLOURS)}


def _outline(shape: str) -> Array:
    """Corners ``[N, 2]`` (y down) of a shape of area 1 around the origin; the circle has none."""
    radius = RADII[shape]
    if shape == "cross":
        length = radius / math.hypot(1, _CROSS_ARM)
        arm = _CROSS_ARM * length
        quarter = [(arm, -length), (arm, -arm), (length, -arm)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(-y, x) for x, y in quarter]
        return np.array(corners)
    if shape == "square":
        half = radius * math.sqrt(0.5)
        return np.array([(-half, -half), (half, -half), (half, half), (-half, half)])
    radii = {"triangle": [radius] * 3, "star": [radius, radius * _STAR_WAIST] * 5}[shape]
    turns = np.arange(len(radii)) * 2 * math.pi / len(radii) - math.pi / 2
    return np.array([(r * math.cos(turn), r * math.sin(turn)) for r, turn in zip(radii, turns, strict=True)])


_OUTLINES = {shape: _outline(shape) for shape in RADII if shape != "circle"}


class _Figure:
    """One thing, ready to be drawn at any place."""

    def __init__(self, thing: Thing, scale: int) -> None:
        side = math.sqrt(AREAS_PX[thing.size]) * scale
        self._radius = RADII["circle"] * side if thing.shape == "circle" else None
        if self._radius is None:
            cos, sin = (f(math.radians(thing.angle_deg)) * side for f in (math.cos, math.sin))
            self._corners: Array = _OUTLINES[thing.shape] @ np.array([[cos, sin], [-sin, cos]])

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, fill: int | tuple[int, int, int]) -> None:
        """Fill the thing with its centre at (x, y)."""
        if self._radius is not None:
            r = self._radius
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        else:
            draw.polygon(np.add(self._corners, (x, y)).ravel().tolist(), fill=fill)


def picture(scene: Scene) -> NDArray[np.uint8]:
    """The picture, uint8 ``[64, 64, 3]`` sRGB: light grey ground of random shade, light noise, 4x supersampling."""
    rng = scene.generator(0)
    shade = int(rng.integers(218, 248))
    side = SIDE_PX * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), (shade, shade, shade))
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        x, y = thing.xy
        _Figure(thing, _SUPERSAMPLING).draw(draw, x * _SUPERSAMPLING, y * _SUPERSAMPLING, COLOURS[thing.colour])
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING)).astype(np.int16)
    noise = rng.integers(-5, 6, (SIDE_PX, SIDE_PX, 1), dtype=np.int16)
    result: NDArray[np.uint8] = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return result


def picture_png(scene: Scene) -> bytes:
    """The picture as PNG."""
    file = io.BytesIO()
    Image.fromarray(picture(scene)).save(file, "png", compress_level=1)
    return file.getvalue()


def video_indices(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The video as palette indices ``[8, 64, 64]`` and the palette ``[11, 3]`` (uint8, sRGB).

    Indices 0 to 3 are greys of the ground, then the colours in order, then the black of a blink.
    """
    rng = scene.generator(2)
    shade = int(rng.integers(222, 246))
    greys = [(shade + 3 * i,) * 3 for i in range(-1, _NUM_GREYS - 1)]
    palette = np.array([*greys, *COLOURS.values(), (16, 16, 16)], dtype=np.uint8)
    ground = np.full((SIDE_PX, SIDE_PX), 1, dtype=np.uint8)
    specks = rng.integers(0, SIDE_PX, (120, 2))
    ground[specks[:, 0], specks[:, 1]] = rng.integers(0, _NUM_GREYS, 120)
    early, late = int(rng.integers(0, 3)), int(rng.integers(4, 7))
    starts = dict(zip(scene.blinks, (early, late), strict=False)) if len(scene.blinks) > 1 else {0: early}
    # Nothing leaves its frame, so all frames are drawn as one tall picture.
    strip = Image.fromarray(np.tile(ground, (NUM_FRAMES, 1)))
    draw = ImageDraw.Draw(strip)
    for i, thing in enumerate(scene.things):
        figure, (x, y), (dx, dy) = _Figure(thing, 1), thing.video_xy, STEPS[scene.moves[i]]
        for f in range(NUM_FRAMES):
            is_black = i in starts and starts[i] <= f < starts[i] + _BLINK_FRAMES
            fill = _BLACK if is_black else _COLOUR_INDEX[thing.colour]
            figure.draw(draw, x + dx * STEP_PX * f, y + (dy * STEP_PX + SIDE_PX) * f, fill)
    return np.asarray(strip).reshape(NUM_FRAMES, SIDE_PX, SIDE_PX), palette


def video_gif(scene: Scene) -> bytes:
    """The video as a GIF of 8 frames at 8 frames a second, without loss."""
    frames, palette = video_indices(scene)
    return encode_gif(frames, palette, FPS)
