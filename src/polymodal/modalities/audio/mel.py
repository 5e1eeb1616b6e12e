"""Log-mel spectrograms in numpy, as Whisper and CLAP compute them.

``T`` samples, ``L`` frames, ``W`` window, ``F`` frequencies, ``M`` mel bands.

Source: Radford et al. 2023, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2 and its code;
the mel scale and the area normalisation are Slaney's (Auditory Toolbox, 1998).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MelScale = Literal["slaney", "htk"]
"""Slaney's: linear to 1 kHz, then logarithmic. HTK's: ``2595 log10(1 + f / 700)`` throughout."""
Levels = Literal["whisper", "decibels"]
"""Powers as ``log10``, held within 8 of the strongest, or as ``10 log10``."""

FLOOR = 1e-10
"""Power below which the logarithm is taken of this instead."""
RANGE_DECADES = 8.0
"""Powers this many factors of ten below the strongest are raised to there."""
_BLOCK = 2048
"""Frames per transform, which bounds the memory of an hour-long recording."""


def hz_to_mel(hz: NDArray[np.float64], scale: MelScale = "slaney") -> NDArray[np.float64]:
    """Frequencies on a mel scale."""
    if scale == "htk":
        htk: NDArray[np.float64] = 2595.0 * np.log10(1.0 + hz / 700.0)
        return htk
    above = 15.0 + np.log(np.maximum(hz, 1000.0) / 1000.0) * (27.0 / math.log(6.4))
    return np.where(hz < 1000.0, hz * 3.0 / 200.0, above)


def mel_to_hz(mel: NDArray[np.float64], scale: MelScale = "slaney") -> NDArray[np.float64]:
    """The inverse of :func:`hz_to_mel`."""
    if scale == "htk":
        htk: NDArray[np.float64] = 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
        return htk
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * (math.log(6.4) / 27.0)))


def mel_filters(
    num_mels: int,
    window: int,
    rate_hz: int,
    *,
    scale: MelScale = "slaney",
    unit_area: bool = True,
    min_hz: float = 0.0,
    max_hz: float | None = None,
) -> NDArray[np.float64]:
    """Triangular filters, evenly spaced on a mel scale.

    Args:
        num_mels: number of bands.
        window: samples of the transform.
        rate_hz: sampling rate.
        scale: the mel scale.
        unit_area: whether each filter has unit area in Hz, or a peak of 1.
        min_hz: where the first filter begins.
        max_hz: where the last one ends; None: half the rate.

    Returns:
        float64 ``[F, M]`` with ``F = window // 2 + 1``.
    """
    limits = hz_to_mel(np.array([min_hz, rate_hz / 2 if max_hz is None else max_hz]), scale)
    edges = mel_to_hz(np.linspace(limits[0], limits[1], num_mels + 2), scale)
    bins = np.linspace(0.0, rate_hz / 2, window // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return triangles * (2.0 / (edges[2:] - edges[:-2])) if unit_area else triangles


def num_mel_frames(num_samples: int, hop: int, end_frame: bool = False) -> int:
    """Frames of a recording: one for every started hop; with ``end_frame`` one for every whole hop, and one more."""
    return num_samples // hop + 1 if end_frame else -(-num_samples // hop)


def log_mel(
    wave_T: NDArray[np.float32],
    filters_FM: NDArray[np.float64],
    window: int,
    hop: int,
    *,
    levels: Levels = "whisper",
    end_frame: bool = False,
) -> NDArray[np.float32]:
    """Logarithm of the mel power spectrum.

    Frame ``l`` is centred on sample ``l * hop``; the signal is mirrored at both ends. A last hop that is not full is
    completed with silence first; with ``end_frame`` it is not, and the frame centred behind the last whole hop counts.

    Args:
        wave_T: float32 ``[T]``, at least one sample.
        filters_FM: from :func:`mel_filters` for the same window.
        window: samples under the periodic Hann window.
        hop: samples between frames.
        levels: how powers become levels.
        end_frame: see above.

    Returns:
        float32 ``[L, M]``, ``L = num_mel_frames(T, hop, end_frame)``; ``whisper``: between -10 and the maximum, no more
        than 8 below it; ``decibels``: from -100.
    """
    num_frames = num_mel_frames(len(wave_T), hop, end_frame)
    whole_T = np.pad(wave_T.astype(np.float64), (0, 0 if end_frame else num_frames * hop - len(wave_T)))
    padded_T = np.pad(whole_T, window // 2, mode="reflect")
    power_LM = _mel_power(padded_T, filters_FM, window, hop, num_frames)
    levels_LM = np.log10(np.maximum(power_LM, FLOOR))
    if levels == "decibels":
        return (10.0 * levels_LM).astype(np.float32)
    clamped_LM: NDArray[np.float32] = np.maximum(levels_LM, levels_LM.max() - RANGE_DECADES).astype(np.float32)
    return clamped_LM


def _mel_power(
    padded_T: NDArray[np.float64], filters_FM: NDArray[np.float64], window: int, hop: int, num_frames: int
) -> NDArray[np.float64]:
    hann_W = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    frames_LW = np.lib.stride_tricks.sliding_window_view(padded_T, window)[::hop][:num_frames]
    power_LM = np.empty((num_frames, filters_FM.shape[1]))
    for start in range(0, num_frames, _BLOCK):
        spectrum_LF = np.fft.rfft(frames_LW[start : start + _BLOCK] * hann_W, axis=1)
        power_LF = spectrum_LF.real**2 + spectrum_LF.imag**2
        power_LM[start : start + _BLOCK] = power_LF @ filters_FM
    return power_LM
