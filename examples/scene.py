"""Small things seen, heard, felt and told: the renderers that the examples share, and how samples reach the disk.

A thing has a shape, a colour, a quadrant and a motion. No view shows all of it:

==========  =====  ======  ========  ======
view        shape  colour  quadrant  motion
==========  =====  ======  ========  ======
image       yes    yes     yes       no
audio       yes    yes     no        no
points      yes    yes     yes       no
sensor      no     no      no        yes
text        yes    yes     yes       yes
==========  =====  ======  ========  ======
"""

from __future__ import annotations

import json
import wave
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

import polymodal as pm
from polymodal.core.samples import sample_to_json

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (225, 215, 40),
    "purple": (190, 50, 210),
    "cyan": (40, 205, 215),
}
SHAPES = ("square", "disc", "cross", "triangle")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
MOTIONS = ("rising", "sinking", "shaking", "circling")

SIDE_PX = 24
RATE_HZ = 8000
SOUND_S = 0.2
NUM_POINTS = 32
SENSOR_HZ = 20
SENSOR_STEPS = 24

_TEMPLATES = (
    "a {colour} {shape} in the {quadrant}, {motion}",
    "{motion} in the {quadrant}: a {shape} that is {colour}",
    "the {shape} is {colour}, {motion}, at the {quadrant}",
)
_HARMONICS = ((1.0,), (1.0, 0.0, 0.8), (1.0, 0.8, 0.0, 0.6), (0.4, 0.2, 0.3, 1.0))
"""Strength of each multiple of the pitch, for each shape."""

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing; every attribute is an index into its list of names."""

    shape: int
    colour: int
    quadrant: int = 0
    motion: int = 0

    @property
    def label(self) -> str:
        """Colour and shape, such as ``red square``."""
        return f"{tuple(COLOURS)[self.colour]} {SHAPES[self.shape]}"


LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The 24 labels."""


def draw_thing(rng: np.random.Generator) -> Thing:
    """A thing with every attribute drawn evenly and alone."""
    return Thing(*(int(rng.integers(count)) for count in (len(SHAPES), len(COLOURS), len(QUADRANTS), len(MOTIONS))))


def picture(thing: Thing, rng: np.random.Generator, noise: float = 12.0, radius_px: float = 4.5) -> pm.Image:
    """The thing in its quadrant on dark ground, uint8 ``[24, 24, 3]``; ``noise`` in grey levels."""
    centre = np.array([6 + 11 * (thing.quadrant // 2), 6 + 11 * (thing.quadrant % 2)]) + rng.uniform(-1, 1, 2)
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] - centre[:, None, None]
    inside = _inside(thing.shape, x / radius_px, y / radius_px)
    canvas = np.full((SIDE_PX, SIDE_PX, 3), 40.0)
    canvas[inside] = tuple(COLOURS.values())[thing.colour]
    canvas += rng.normal(0, noise, canvas.shape)
    return pm.Image(np.clip(canvas, 0, 255).astype(np.uint8))


def sound(thing: Thing, rng: np.random.Generator, noise: float = 0.02) -> pm.Audio:
    """A tone: its pitch is the colour, its harmonics are the shape; ``noise`` beside an amplitude of 0.3."""
    pitch_hz = 220.0 * 2 ** (thing.colour / 3) * rng.uniform(0.98, 1.02)
    time_s = np.arange(round(SOUND_S * RATE_HZ)) / RATE_HZ
    wave_T = np.zeros_like(time_s)
    for multiple, strength in enumerate(_HARMONICS[thing.shape], 1):
        wave_T += strength * np.sin(2 * np.pi * (multiple * pitch_hz * time_s + rng.uniform()))
    wave_T = 0.3 * wave_T / np.abs(wave_T).max() + rng.normal(0, noise, len(time_s))
    return pm.Audio(np.clip(wave_T, -1, 1).astype(np.float32), rate_hz=RATE_HZ)


def cloud(thing: Thing, rng: np.random.Generator, noise: float = 0.03) -> pm.Points:
    """Points on the shape with the colour, float32 ``[32, 6]``; the quadrant is where they lie."""
    found = np.zeros((0, 2))
    while len(found) < NUM_POINTS:
        tried = rng.uniform(-1, 1, (4 * NUM_POINTS, 2))
        found = np.concatenate([found, tried[_inside(thing.shape, tried[:, 0], tried[:, 1])]])
    centre = np.array([2 * (thing.quadrant % 2) - 1, 2 * (thing.quadrant // 2) - 1])
    flat = found[:NUM_POINTS] + centre
    colour = np.array(tuple(COLOURS.values())[thing.colour]) / 255
    rows = np.concatenate([flat, np.zeros((NUM_POINTS, 1)), np.tile(colour, (NUM_POINTS, 1))], axis=1)
    rows += rng.normal(0, noise, rows.shape)
    rows[:, 3:] = rows[:, 3:].clip(0, 1)
    return pm.Points(rows.astype(np.float32))


def movement(thing: Thing, rng: np.random.Generator, noise: float = 0.1) -> pm.Sensor:
    """Acceleration and turning of the motion, float32 ``[24, 6]`` at 20 Hz; nothing but the motion shows."""
    time_s = np.arange(SENSOR_STEPS) / SENSOR_HZ
    phase, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.2)
    rows = np.zeros((SENSOR_STEPS, 6))
    if thing.motion in (0, 1):
        rows[:, 1] = (1 if thing.motion == 0 else -1) * speed
    elif thing.motion == 2:
        rows[:, 0] = np.sin(2 * np.pi * 5 * speed * time_s + phase)
    else:
        rows[:, 0] = np.cos(2 * np.pi * speed * time_s + phase)
        rows[:, 1] = np.sin(2 * np.pi * speed * time_s + phase)
        rows[:, 5] = speed
    rows += rng.normal(0, noise, rows.shape)
    return pm.Sensor(rows.astype(np.float32), rate_hz=SENSOR_HZ)


def caption(thing: Thing, rng: np.random.Generator) -> str:
    """All four attributes in one of three sentences."""
    return _TEMPLATES[rng.integers(len(_TEMPLATES))].format(
        colour=tuple(COLOURS)[thing.colour],
        shape=SHAPES[thing.shape],
        quadrant=QUADRANTS[thing.quadrant],
        motion=MOTIONS[thing.motion],
    )


def _inside(shape: int, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which places of the square -1..1 belong to the shape."""
    in_square = (np.abs(x) <= 0.9) & (np.abs(y) <= 0.9)
    if shape == 0:
        return in_square
    if shape == 1:
        return np.hypot(x, y) <= 1.0
    if shape == 2:
        return in_square & ((np.abs(x) <= 0.33) | (np.abs(y) <= 0.33))
    return (np.abs(y) <= 0.95) & (np.abs(x) <= (y + 0.95) / 2)


def write_samples(path: Path, samples: Iterable[pm.Sample]) -> None:
    """Write view sets as JSON Lines, and their media beside them as PNG, WAV and NPY."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            views = {name: _stored(part, folder / f"{sample.id}.{name}") for name, part in sample.views.items()}
            file.write(json.dumps(sample_to_json(replace(sample, views=views), path.parent)) + "\n")


def _stored(part: pm.Text, stem: Path) -> pm.Text:
    """The part with its array moved into a file."""
    if isinstance(part, pm.Text):
        return part
    suffix = {"image": ".png", "audio": ".wav"}.get(part.modality, ".npy")
    path = stem.with_name(stem.name + suffix)
    if part.modality == "image":
        Picture.fromarray(part.source).save(path, compress_level=1)
    elif part.modality == "audio":
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(part.rate_hz)
            file.writeframes((part.source * 32767).astype("<i2").tobytes())
        return pm.Audio(path)
    else:
        np.save(path, part.source)
    return replace(part, source=path)


def shuffled(samples: Sequence[pm.Sample], view: str, rng: np.random.Generator) -> list[pm.Sample]:
    """The samples with one view dealt out anew: the control that breaks what pairs have in common."""
    order = rng.permutation(len(samples))
    return [
        replace(sample, views={**sample.views, view: samples[other].views[view]})
        for sample, other in zip(samples, order, strict=True)
    ]
