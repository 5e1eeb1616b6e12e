"""The sound of a scene: the voice of the first object, one to four times, as 8 kHz mono 16-bit WAV.

Legend: T samples.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from polymodal.data.scenes.latent import SOUNDS, Scene

RATE_HZ = 8_000
SECONDS = 1.2
_NOTE_S = 0.16
_PERIOD_S = 0.28

Wave = NDArray[np.float32]
Voice = Callable[[Wave, np.random.Generator], Wave]


def _beep(t: Wave, rng: np.random.Generator) -> Wave:
    """A pure tone, 500 to 900 Hz."""
    return np.asarray(np.sin(2 * np.pi * rng.uniform(500, 900) * t))


def _buzz(t: Wave, rng: np.random.Generator) -> Wave:
    """A square wave, 110 to 190 Hz."""
    return np.asarray(0.6 * np.sign(np.sin(2 * np.pi * rng.uniform(110, 190) * t)))


def _chirp(t: Wave, rng: np.random.Generator) -> Wave:
    """A tone that rises from 500..800 Hz to three times that."""
    low = rng.uniform(500, 800)
    return np.asarray(np.sin(2 * np.pi * low * (t + t * t / _NOTE_S)))


def _ring(t: Wave, rng: np.random.Generator) -> Wave:
    """Three partials of a bell, 1 : 2.76 : 5.40, struck and dying away."""
    low = rng.uniform(420, 620)
    wave = sum(level * np.sin(2 * np.pi * low * part * t) for part, level in ((1, 0.5), (2.76, 0.35), (5.4, 0.25)))
    return np.asarray(wave * np.exp(-14 * t), dtype=np.float32)


def _hiss(t: Wave, rng: np.random.Generator) -> Wave:
    """Noise without its low end."""
    noise = rng.standard_normal(t.size + 1, dtype=np.float32)
    return np.float32(0.2) * np.diff(noise)


VOICES: dict[str, Voice] = {"beep": _beep, "buzz": _buzz, "chirp": _chirp, "ring": _ring, "hiss": _hiss}
_TIMES = (np.arange(int(_NOTE_S * RATE_HZ)) / RATE_HZ).astype(np.float32)
_EDGE = np.minimum(1, np.minimum(_TIMES, _TIMES[::-1]) / 0.008).astype(np.float32)


def sound(scene: Scene) -> NDArray[np.int16]:
    """The recording, int16 ``[9600]``: notes of 0.16 s every 0.28 s at level 0.25 to 0.8, light noise."""
    rng = scene.generator(1)
    length = int(SECONDS * RATE_HZ)
    wave = rng.standard_normal(length, dtype=np.float32) * np.float32(rng.uniform(0.001, 0.006))
    note = VOICES[SOUNDS[scene.sounding.shape]](_TIMES, rng) * _EDGE * np.float32(rng.uniform(0.25, 0.8))
    used_s = _PERIOD_S * (scene.sound_count - 1) + _NOTE_S
    start_s = rng.uniform(0.02, SECONDS - used_s - 0.02)
    for k in range(scene.sound_count):
        start = int((start_s + k * _PERIOD_S) * RATE_HZ)
        wave[start : start + note.size] += note
    result: NDArray[np.int16] = np.clip(wave * 32767, -32767, 32767).astype(np.int16)
    return result


def sound_wav(scene: Scene) -> bytes:
    """The recording as a WAV file."""
    data = sound(scene).astype("<i2").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE_HZ, 2 * RATE_HZ, 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 4 + len(form) + 8 + len(data))
        + b"WAVE"
        + form
        + struct.pack("<4sI", b"data", len(data))
        + data
    )
