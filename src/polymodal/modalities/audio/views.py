"""Four views of a recording that is longer than a clip.

Legend: ``L`` frames of the recording, ``N`` frames of a view, ``M`` mel bands.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_VIEWS = 4


def four_views(mel_LM: NDArray[np.float32], num_frames: int) -> NDArray[np.float32]:
    """The whole recording in few frames, and a crop of its first, second and last third.

    Where the published code draws a crop's place at random, this takes the middle of its third. A recording of no more
    than one view is given four times.

    Source: CLAP, arXiv 2211.06687, section 2.2.

    Args:
        mel_LM: the frames of all of it, at least ``num_frames``.
        num_frames: ``N``.

    Returns:
        ``[N, 4, M]``.
    """
    spare = len(mel_LM) - num_frames
    if not spare:
        return np.stack([mel_LM] * NUM_VIEWS, axis=1)
    thirds = np.array_split(np.arange(spare + 1), 3)
    starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
    crops = [mel_LM[start : start + num_frames] for start in starts]
    return np.stack([_shrunk(mel_LM, num_frames), *crops], axis=1)


def _shrunk(mel_LM: NDArray[np.float32], num_frames: int) -> NDArray[np.float32]:
    """Linear interpolation between frames, ends aligned by their outer edges."""
    place_N = (np.arange(num_frames) + 0.5) * (len(mel_LM) / num_frames) - 0.5
    place_N = np.clip(place_N, 0.0, len(mel_LM) - 1)
    left_N = np.floor(place_N).astype(np.int64)
    right_N = np.minimum(left_N + 1, len(mel_LM) - 1)
    share_N1 = (place_N - left_N).astype(np.float32)[:, None]
    shrunk_NM: NDArray[np.float32] = mel_LM[left_N] * (1 - share_N1) + mel_LM[right_N] * share_N1
    return shrunk_NM
