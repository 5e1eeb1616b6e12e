"""The frames of a video that a question is about, by the model's shared space.

Legend: ``F`` candidate frames, ``H``, ``W`` height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import ConfigError
from polymodal.core.parts import Image, Video
from polymodal.modalities.video import probe_video
from polymodal.modalities.video.decode import iter_frames, spread_indices

if TYPE_CHECKING:
    from polymodal.recipes.model import Model


def keyframes(model: Model, video: Video, question: str, count: int, candidates: int) -> Video:
    """The video of the ``count`` frames most like the question, in their order.

    Source: the selection by relevance alone (TOP) of adaptive keyframe sampling, arXiv 2502.21271, section 3; of equal
    frames the earlier are taken, so that the same video and question always give the same frames.

    Args:
        model: with a text and an image stream in one shared space.
        video: what is asked about.
        question: the words.
        count: frames wanted; a shorter video gives all it has.
        candidates: frames looked at, spread evenly over the video.

    Returns:
        The frames as an array, with so many frames per second that the video lasts as long as before.

    Raises:
        ConfigError: if fewer candidates than frames are asked for, or the model has no shared space.
        SampleError: if the space holds no pictures or no text.
        MediaError: if the video cannot be read.
    """
    if not 1 <= count <= candidates:
        raise ConfigError(f"keyframes: found {count} frames of {candidates} candidates, expected 1 to {candidates}")
    limits = model.recipe.limits
    header = probe_video(video, limits)
    indices = spread_indices(header.num_frames, candidates)
    frames = [frame.pixels for frame in iter_frames(video, limits, header, indices)]
    vectors = model.embed([question, *(Image(pixels) for pixels in frames)])
    places = most_like(vectors[1:] @ vectors[0], count)
    chosen_FHW3 = np.stack([frames[place] for place in places])
    return Video(chosen_FHW3, fps=len(chosen_FHW3) * header.fps / header.num_frames)


def most_like(likeness_F: NDArray[np.float32], count: int) -> list[int]:
    """The places of the ``count`` largest, ascending; of equal ones the first.

    Worked example: ``[0.1 0.9 0.3 0.9]`` and 2 wanted give ``[1 3]``.
    """
    return sorted(np.argsort(-likeness_F, kind="stable")[:count].tolist())
