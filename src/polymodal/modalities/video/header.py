"""What a video says about itself: frames, rate and size, without decoding one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from polymodal.core.errors import CorruptMediaError, LimitError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Video
from polymodal.modalities.container import container_format, opened_container, packet_seconds, stream_seconds
from polymodal.modalities.decoding import check_array, describe_head, is_encoded, named_errors, opened
from polymodal.modalities.image.gif import scan_gif

TAKES = "a path or bytes (MP4, MOV, WebM, MKV, AVI, GIF), or a uint8 array [F, H, W, 3] with fps"


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Size and kind of a video.

    Args:
        num_frames: frames; exact for GIF and arrays, as stated (or duration x rate) for containers.
        fps: frames per second, the average where it varies.
        width_px: width as stored; a stated rotation is undone later, frame by frame.
        height_px: height as stored.
        format: ``mov``, ``matroska``, ``avi``, ``GIF`` or ``array``.
        starts_s: of a GIF, when each frame starts.
    """

    num_frames: int
    fps: float
    width_px: int
    height_px: int
    format: str
    starts_s: tuple[float, ...] = ()

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.num_frames / self.fps


def probe_video(part: Video, limits: Limits) -> VideoHeader:
    """Read the header.

    Where a container states neither frames nor duration, its packets are read (not decoded) to know them.

    Raises:
        CorruptMediaError: if it is damaged, truncated or empty.
        LimitError: if the file, its duration, its frames or their size is above the limits.
        UnsupportedMediaError: if the source or format is none that is read, or there is no video track.
    """
    if not is_encoded(part):
        return _within(part, _array_header(part), limits)
    with opened(part, limits, TAKES) as (file, _):
        head = file.read(12)
        if is_gif(head):
            return _within(part, _gif_header(part, file, limits), limits)
    if container_format(head) is None:
        raise UnsupportedMediaError(part.name, f"is no video that can be read: {describe_head(head)}; expected {TAKES}")
    return _within(part, _track_header(part, limits), limits)


def is_gif(head: bytes) -> bool:
    """Whether a file starts as a GIF does."""
    return head[:6] in (b"GIF87a", b"GIF89a")


def video_track(part: Video, container: Any) -> Any:
    """The video stream of an open container; cover pictures do not count.

    Raises:
        UnsupportedMediaError: if there is none.
    """
    stream = container.streams.best("video")
    if stream is None:
        raise UnsupportedMediaError(part.name, "has no video track; expected a file with moving pictures")
    return stream


def _gif_header(part: Video, file: BinaryIO, limits: Limits) -> VideoHeader:
    blocks = scan_gif(part, file, limits.video_frames)
    fps = len(blocks.starts_s) / blocks.duration_s if blocks.duration_s else 1.0
    return VideoHeader(len(blocks.starts_s), fps, blocks.width_px, blocks.height_px, "GIF", blocks.starts_s)


def _track_header(part: Video, limits: Limits) -> VideoHeader:
    with opened_container(part, limits, TAKES) as container:
        stream = video_track(part, container)
        with named_errors(part, "reading the video track"):
            count = int(stream.frames)
            seconds = stream_seconds(stream)
            fps = float(stream.average_rate or stream.base_rate or 0)
            width, height = int(stream.codec_context.width), int(stream.codec_context.height)
            if seconds is None and (count < 1 or fps <= 0):
                seconds, packets = packet_seconds(container, stream)
                count = count if count > 0 else packets
            if count < 1 and seconds is not None:
                count = round(seconds * fps)
            if seconds and not fps > 0:
                fps = count / seconds
            name = str(container.format.name).split(",", maxsplit=1)[0]
    return VideoHeader(count, fps, width, height, name)


def _array_header(part: Video) -> VideoHeader:
    array = check_array(part, TAKES)
    if array.dtype != np.uint8:
        hint = "; multiply by 255 and cast" if array.dtype.kind == "f" else ""
        raise UnsupportedMediaError(part.name, f"found an array of {array.dtype}, expected uint8 in 0..255{hint}")
    if array.ndim != 4 or array.shape[3] != 3:
        raise UnsupportedMediaError(
            part.name, f"found an array of shape {array.shape}, expected [F, H, W, 3] (channels last)"
        )
    if part.fps is None:
        raise UnsupportedMediaError(part.name, "an array has no frame rate; give it: Video(array, fps=25)")
    return VideoHeader(array.shape[0], part.fps, array.shape[2], array.shape[1], "array")


def _within(part: Video, header: VideoHeader, limits: Limits) -> VideoHeader:
    if header.num_frames < 1:
        raise CorruptMediaError(part.name, "states no frames; expected at least one")
    if not (math.isfinite(header.fps) and header.fps > 0):
        raise CorruptMediaError(part.name, f"a rate of {header.fps} frames per second; expected a positive number")
    if header.width_px < 1 or header.height_px < 1:
        raise CorruptMediaError(
            part.name, f"frames of {header.width_px} x {header.height_px} px; expected at least 1 x 1"
        )
    pixels = header.width_px * header.height_px
    if pixels > limits.video_pixels:
        raise LimitError(
            part.name,
            f"frames of {header.width_px:,} x {header.height_px:,} = {pixels:,} pixels, "
            f"the limit (video_pixels) is {limits.video_pixels:,}",
        )
    if header.num_frames > limits.video_frames:
        raise LimitError(part.name, f"{header.num_frames:,} frames, the limit (video_frames) is {limits.video_frames}")
    if header.duration_s > limits.video_seconds:
        raise LimitError(
            part.name,
            f"lasts {header.duration_s:,.1f} s, the limit (video_seconds) is {limits.video_seconds:,.1f}; "
            "cut it or raise the limit",
        )
    if part.fps is not None and header.format != "array" and abs(part.fps - header.fps) > 0.01 * header.fps:
        raise UnsupportedMediaError(
            part.name,
            f"the file's header says {header.fps:.3f} frames per second, fps says {part.fps:.3f}; "
            "leave fps out for files",
        )
    return header
