"""Log-mel spectrograms in numpy, as Whisper computes them.

``T`` samples, ``L`` frames, ``W`` window, ``F`` frequencies, ``M`` mel bands.

Source: Radford et al. 2023, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2 and its code;
the mel scale and the area normalisation are Slaney's (Auditory Toolbox, 1998).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FLOOR = 1e-10
"""Power below which the logarithm is taken of this instead."""
RANGE_DECADES = 8.0
"""Powers this many factors of ten below the strongest are raised to there."""
_BLOCK = 2048
"""Frames per transform, which bounds the memory of an hour-long recording."""


def hz_to_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slaney's mel scale: linear to 1 kHz (15 mel), logarithmic above."""
    above = 15.0 + np.log(np.maximum(hz, 1000.0) / 1000.0) * (27.0 / math.log(6.4))
    return np.where(hz < 1000.0, hz * 3.0 / 200.0, above)


def mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of :func:`hz_to_mel`."""
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * (math.log(6.4) / 27.0)))


def mel_filters(num_mels: int, window: int, rate_hz: int) -> NDArray[np.float64]:
    """Triangular filters from 0 Hz to half the rate, each of unit area in Hz.

    Args:
        num_mels: number of bands.
        window: samples of the transform.
        rate_hz: sampling rate.

    Returns:
        float64 ``[F, M]`` with ``F = window // 2 + 1``.
    """
    top = float(hz_to_mel(np.array(rate_hz / 2)))
    edges = mel_to_hz(np.linspace(0.0, top, num_mels + 2))
    bins = np.linspace(0.0, rate_hz / 2, window // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return triangles * (2.0 / (edges[2:] - edges[:-2]))


def num_mel_frames(num_samples: int, hop: int) -> int:
    """Frames of a recording: one for every started hop."""
    return -(-num_samples // hop)


def log_mel(wave_T: NDArray[np.float32], filters_FM: NDArray[np.float64], window: int, hop: int) -> NDArray[np.float32]:
    """Logarithm (base 10) of the mel power spectrum.

    Frame ``l`` is centred on sample ``l * hop``; the signal is mirrored at both ends. A last hop that is not full is
    completed with silence first.

    Args:
        wave_T: float32 ``[T]``, at least one sample.
        filters_FM: from :func:`mel_filters` for the same window.
        window: samples under the periodic Hann window.
        hop: samples between frames.

    Returns:
        float32 ``[L, M]``, ``L = num_mel_frames(T, hop)``; between -10 and the maximum, no more than 8 below it.
    """
    num_frames = num_mel_frames(len(wave_T), hop)
    whole_T = np.pad(wave_T.astype(np.float64), (0, num_frames * hop - len(wave_T)))
    padded_T = np.pad(whole_T, window // 2, mode="reflect")
    hann_W = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    frames_LW = np.lib.stride_tricks.sliding_window_view(padded_T, window)[::hop][:num_frames]
    power_LM = np.empty((num_frames, filters_FM.shape[1]))
    for start in range(0, num_frames, _BLOCK):
        spectrum_LF = np.fft.rfft(frames_LW[start : start + _BLOCK] * hann_W, axis=1)
        power_LF = spectrum_LF.real**2 + spectrum_LF.imag**2
        power_LM[start : start + _BLOCK] = power_LF @ filters_FM
    levels_LM = np.log10(np.maximum(power_LM, FLOOR))
    clamped_LM: NDArray[np.float32] = np.maximum(levels_LM, levels_LM.max() - RANGE_DECADES).astype(np.float32)
    return clamped_LM
