"""The sensor recording of a scene: acceleration (g) and turn rate (deg/s) of a device that is moved, as CSV.

Legend: T time steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from polymodal.data.scenes.latent import Scene

RATE_HZ = 50
NUM_STEPS = 100
CHANNELS = ("ax", "ay", "az", "gx", "gy", "gz")

Array = NDArray[np.float64]
Motion = Callable[[Array, np.random.Generator], None]
_TIMES = np.arange(NUM_STEPS) / RATE_HZ


def _bump(start_s: float, width_s: float) -> Array:
    """A raised cosine of height 1."""
    phase = (_TIMES - start_s) / width_s
    return np.where((phase > 0) & (phase < 1), 0.5 - 0.5 * np.cos(2 * np.pi * phase), 0.0)


def _shake(x_T6: Array, rng: np.random.Generator) -> None:
    """To and fro along a level axis, 3.5 to 6.5 Hz, for 1 s or more."""
    way = rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * rng.uniform(3.5, 6.5) * _TIMES + rng.uniform(0, 2 * np.pi)) * rng.uniform(0.7, 1.8)
    wave *= rng.uniform(0, 0.6) <= _TIMES
    x_T6[:, 0] += wave * np.cos(way)
    x_T6[:, 1] += wave * np.sin(way)
    x_T6[:, 3:] += wave[:, None] * rng.uniform(-25, 25, 3)


def _spin(x_T6: Array, rng: np.random.Generator) -> None:
    """A turn about the upright axis, either way, speeding up and slowing down."""
    x_T6[:, 5] += _bump(rng.uniform(0, 0.4), rng.uniform(1.2, 1.6)) * rng.uniform(180, 420) * rng.choice((-1, 1))


def _lift(x_T6: Array, rng: np.random.Generator) -> None:
    """Up: pushed, then braked as much."""
    start, width = rng.uniform(0.1, 0.5), rng.uniform(0.45, 0.65)
    x_T6[:, 2] += rng.uniform(0.25, 0.5) * (_bump(start, width) - _bump(start + width, width))


def _drop(x_T6: Array, rng: np.random.Generator) -> None:
    """Free fall for 0.35 to 0.6 s, then the impact."""
    start = rng.uniform(0.2, 0.9)
    end = start + rng.uniform(0.35, 0.6)
    x_T6[(start <= _TIMES) & (end > _TIMES), :3] = 0
    x_T6[:, 2] += _bump(end, 0.08) * rng.uniform(3, 6)
    x_T6[:, 3:] += _bump(end, 0.16)[:, None] * rng.uniform(-60, 60, 3)


def _tap(x_T6: Array, rng: np.random.Generator) -> None:
    """One or two short knocks from above."""
    start = rng.uniform(0.1, 1.2)
    for k in range(int(rng.integers(1, 3))):
        x_T6[:, 2] -= _bump(start + 0.3 * k, 0.09) * rng.uniform(0.8, 1.6)
        x_T6[:, 3:] += _bump(start + 0.3 * k, 0.1)[:, None] * rng.uniform(-15, 15, 3)


def _still(x_T6: Array, rng: np.random.Generator) -> None:
    """Nothing but gravity."""


MOTION_MAKERS: dict[str, Motion] = {
    "shake": _shake,
    "spin": _spin,
    "lift": _lift,
    "drop": _drop,
    "tap": _tap,
    "still": _still,
}


def recording(scene: Scene) -> Array:
    """The recording ``[100, 6]``: a device lying nearly level (up to 8 degrees), its motion, and noise."""
    rng = scene.generator(4)
    x_T6 = np.zeros((NUM_STEPS, len(CHANNELS)))
    tilt = np.radians(rng.uniform(-8, 8, 2))
    x_T6[:, :3] = (np.sin(tilt[0]), np.sin(tilt[1]), np.cos(tilt[0]) * np.cos(tilt[1]))
    MOTION_MAKERS[scene.motion](x_T6, rng)
    noise = rng.standard_normal(x_T6.shape)
    x_T6[:, :3] += noise[:, :3] * rng.uniform(0.008, 0.02)
    x_T6[:, 3:] += noise[:, 3:] * rng.uniform(0.5, 1.5) + rng.uniform(-1, 1, 3)
    return x_T6


_LINES = "".join(f"{k / RATE_HZ:.2f},%.3f,%.3f,%.3f,%.1f,%.1f,%.1f\n" for k in range(NUM_STEPS))


def recording_csv(scene: Scene) -> bytes:
    """The recording as CSV with a header row and a time column in seconds."""
    text = _LINES % tuple(recording(scene).ravel().tolist())
    return f"time,{','.join(CHANNELS)}\n{text}".encode()
