"""Filter bank features as Kaldi computes them (without dither), which AST and ImageBind read.

``T`` samples, ``L`` frames, ``W`` window, ``F`` frequencies, ``M`` mel bands.

Source: the Kaldi toolkit, ``feat/feature-fbank`` and ``feat/mel-computations``, with a Hann window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOWEST_HZ = 20.0
"""Where the first band begins; the last ends at half the rate."""
_PREEMPHASIS = 0.97
_FLOOR = float(np.finfo(np.float32).eps)


def transform_size(window: int) -> int:
    """Samples of the transform: the next power of two."""
    return 1 << (window - 1).bit_length()


def fbank_filters(num_mels: int, window: int, rate_hz: int) -> NDArray[np.float64]:
    """Filters that are triangles on the mel scale ``1127 ln(1 + f / 700)``, each with a peak of 1.

    Returns:
        float64 ``[F, M]`` with ``F = transform_size(window) // 2 + 1``; half the rate itself is in no band.
    """
    size = transform_size(window)
    mel_F = 1127.0 * np.log(1.0 + np.arange(size // 2 + 1) * (rate_hz / size) / 700.0)
    ends = 1127.0 * np.log(1.0 + np.array([LOWEST_HZ, rate_hz / 2]) / 700.0)
    edges = np.linspace(ends[0], ends[1], num_mels + 2)
    rising = (mel_F[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel_F[:, None]) / (edges[2:] - edges[1:-1])
    filters_FM: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    filters_FM[-1] = 0.0
    return filters_FM


def num_fbank_frames(num_samples: int, window: int, hop: int) -> int:
    """Frames that lie within the recording; a shorter one is completed with silence to one frame."""
    return max(0, num_samples - window) // hop + 1


def fbank(wave_T: NDArray[np.float32], filters_FM: NDArray[np.float64], window: int, hop: int) -> NDArray[np.float32]:
    """Natural logarithm of the mel power spectrum.

    The mean of the recording and then of each frame is taken out, high frequencies are raised (0.97 of the sample
    before is subtracted), and the window is a symmetric Hann window.

    Args:
        wave_T: float32 ``[T]`` in -1..1.
        filters_FM: from :func:`fbank_filters` for the same window.
        window: samples of a frame.
        hop: samples between frames.

    Returns:
        float32 ``[L, M]``, ``L = num_fbank_frames(T, window, hop)``.
    """
    wide_T = wave_T.astype(np.float64) - wave_T.astype(np.float64).mean()
    wide_T = np.pad(wide_T, (0, max(0, window - len(wide_T))))
    frames_LW = np.lib.stride_tricks.sliding_window_view(wide_T, window)[::hop]
    frames_LW = frames_LW - frames_LW.mean(axis=1, keepdims=True)
    before_LW = np.concatenate((frames_LW[:, :1], frames_LW[:, :-1]), axis=1)
    hann_W = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / (window - 1))
    shaped_LW = (frames_LW - _PREEMPHASIS * before_LW) * hann_W
    spectrum_LF = np.fft.rfft(shaped_LW, n=transform_size(window), axis=1)
    power_LM = (spectrum_LF.real**2 + spectrum_LF.imag**2) @ filters_FM
    levels_LM: NDArray[np.float32] = np.log(np.maximum(power_LM, _FLOOR)).astype(np.float32)
    return levels_LM
