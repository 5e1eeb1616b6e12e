"""Frames of a video: RGB, upright, with their times.

One pass from the start: every frame is decoded, because later ones depend on it, but only wanted frames are converted
to RGB. ``F`` frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, LimitError
from polymodal.core.limits import Limits
from polymodal.core.parts import Video
from polymodal.modalities.container import opened_container
from polymodal.modalities.decoding import is_encoded, named_errors, opened
from polymodal.modalities.image import on_white
from polymodal.modalities.video.header import TAKES, VideoHeader, probe_video, video_track

MAX_FRAMES_MISSING = 2
"""Frames (or 2 %, if that is more) by which a container may fall short of its header's count, which is often an
estimate; the last frame then stands for the missing ones. More is a truncated file."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame: its index, its time in seconds from the first, and uint8 ``[H, W, 3]`` RGB."""

    index: int
    time_s: float
    pixels: NDArray[np.uint8]


Place = Literal["middle", "start", "ends"]
"""Which frame stands for its span of a video."""


def spread_indices(available: int, wanted: int, place: Place = "middle") -> tuple[int, ...]:
    """One frame of each of ``min(wanted, available)`` equal spans of the video.

    Example: 4 of 16 frames are 2, 6, 10 and 14 (``middle``), 0, 4, 8 and 12 (``start``), or 0, 5, 10 and 15 (``ends``);
    8 of 3 frames are 0, 1 and 2.
    """
    count = min(available, wanted)
    if place == "start":
        return tuple((i * available) // count for i in range(count))
    if place == "ends" and count > 1:
        return tuple((i * (available - 1)) // (count - 1) for i in range(count))
    return tuple(((2 * i + 1) * available) // (2 * count) for i in range(count))


def clip_indices(available: int, wanted: int, stride: int) -> tuple[int, ...]:
    """``wanted`` frames at a distance of ``stride``, from the middle of the video.

    Example: 4 of 20 frames at a stride of 3 are 5, 8, 11 and 14. Where the video is too short, the largest stride that
    fits is taken; where it has fewer frames than wanted, all of them.
    """
    count = min(available, wanted)
    stride = min(stride, (available - 1) // (count - 1)) if count > 1 else 1
    first = (available - (count - 1) * stride - 1) // 2
    return tuple(range(first, first + count * stride, stride))[:count]


def decode_frames(
    part: Video, limits: Limits, *, num_frames: int | None = None, indices: Sequence[int] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Decode chosen frames of one video.

    Args:
        part: the video.
        limits: applied to the header before anything is decoded.
        num_frames: so many, evenly spread (all, if there are fewer); None: all of them.
        indices: or exactly these, counted from 0, in any order; not together with ``num_frames``.

    Returns:
        uint8 ``[F, H, W, 3]`` RGB, and float64 ``[F]`` times in seconds from the first frame.

    Raises:
        CorruptMediaError: if it is truncated or damaged.
        LimitError: if the header claims more than the limits allow.
        UnsupportedMediaError: if the source or format is none that is read.
        ValueError: if an index is outside the video, or both ways of choosing are used.
    """
    header = probe_video(part, limits)
    if indices is not None and num_frames is not None:
        raise ValueError("give num_frames or indices, not both")
    if indices is None:
        indices = spread_indices(header.num_frames, header.num_frames if num_frames is None else num_frames)
    if not indices or min(indices) < 0 or max(indices) >= header.num_frames:
        raise ValueError(f"{part.name}: found indices {list(indices)[:8]}, expected some in 0..{header.num_frames - 1}")
    wanted = sorted(set(indices))
    frames = dict(zip(wanted, iter_frames(part, limits, header, wanted), strict=True))
    pixels = np.stack([frames[index].pixels for index in indices])
    return pixels, np.array([frames[index].time_s for index in indices])


def iter_frames(part: Video, limits: Limits, header: VideoHeader, indices: Sequence[int]) -> Iterator[Frame]:
    """The frames at ``indices`` (ascending, distinct, below ``header.num_frames``), one after the other.

    Raises:
        MediaError: as :func:`decode_frames` does.
    """
    if not is_encoded(part):
        for index in indices:
            yield Frame(index, index / header.fps, np.array(part.source[index], order="C"))
        return
    chosen = _gif_frames if header.format == "GIF" else _track_frames
    shape: tuple[int, ...] | None = None
    for frame in chosen(part, limits, header, indices):
        shape = shape or frame.pixels.shape
        if frame.pixels.shape != shape:
            raise CorruptMediaError(
                part.name,
                f"frame {frame.index} has the shape {frame.pixels.shape}, the ones before it {shape}; "
                "expected one size in the whole video",
            )
        yield frame


def _track_frames(part: Video, limits: Limits, header: VideoHeader, indices: Sequence[int]) -> Iterator[Frame]:
    remaining = deque(indices)
    decoded, last, start = 0, None, None
    with opened_container(part, limits, TAKES) as container:
        for frame in _decoded(part, container, video_track(part, container)):
            if frame.width * frame.height > limits.video_pixels:
                raise LimitError(
                    part.name,
                    f"frame {decoded} has {frame.width:,} x {frame.height:,} pixels, "
                    f"the limit (video_pixels) is {limits.video_pixels:,}",
                )
            start = _time(frame, 0.0) if start is None else start
            if decoded == remaining[0]:
                yield _converted(part, frame, remaining.popleft(), start, header)
            decoded, last = decoded + 1, frame
            if not remaining:
                return
        missing = header.num_frames - decoded
        if last is None or missing > max(MAX_FRAMES_MISSING, header.num_frames // 50):
            raise CorruptMediaError(
                part.name,
                f"the header promises {header.num_frames:,} frames, the content has {decoded:,}; "
                "the file is truncated or its header is wrong",
            )
        for index in remaining:
            yield _converted(part, last, index, start or 0.0, header)


def _decoded(part: Video, container: Any, stream: Any) -> Iterator[Any]:
    with named_errors(part, "decoding the video track"):
        yield from container.decode(stream)


def _converted(part: Video, frame: Any, index: int, start_s: float, header: VideoHeader) -> Frame:
    with named_errors(part, f"converting frame {index}"):
        pixels = frame.to_ndarray(format="rgb24")
        turns = round((frame.rotation or 0) / 90) % 4  # counter-clockwise, as numpy turns
        upright = np.ascontiguousarray(np.rot90(pixels, turns))
        return Frame(index, _time(frame, start_s + index / header.fps) - start_s, upright)


def _time(frame: Any, otherwise: float) -> float:
    return otherwise if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)


def _gif_frames(part: Video, limits: Limits, header: VideoHeader, indices: Sequence[int]) -> Iterator[Frame]:
    with (
        opened(part, limits, TAKES) as (file, _),
        named_errors(part, "decoding the GIF"),
        PIL.Image.open(file, formats=("GIF",)) as image,
    ):
        for index in indices:
            image.seek(index)
            image.load()
            yield Frame(index, header.starts_s[index], on_white(np.asarray(image.convert("RGBA"))))
