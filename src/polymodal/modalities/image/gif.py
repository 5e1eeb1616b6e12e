"""The blocks of a GIF file: how many frames, how long each, and whether the file is whole, without decompressing.

Source: GIF89a specification, sections 17 to 27 (CompuServe 1990).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from polymodal.core.errors import CorruptMediaError, LimitError
from polymodal.core.parts import Media

_DEFAULT_DELAY_S = 0.1
"""What viewers show a frame for when its delay is 0 or missing."""


@dataclass(frozen=True, slots=True)
class GifBlocks:
    """Canvas size, and the start and the end of each frame in seconds."""

    width_px: int
    height_px: int
    starts_s: tuple[float, ...]
    duration_s: float


def scan_gif(part: Media, file: BinaryIO, max_frames: int) -> GifBlocks:
    """Walk the blocks of a GIF.

    Raises:
        CorruptMediaError: if it ends before its trailer, or a block is of no known kind.
        LimitError: if it has more than ``max_frames`` frames.
    """
    file.seek(0)
    head = _take(part, file, 13)
    width, height, flags = struct.unpack("<HHB", head[6:11])
    _skip_palette(part, file, flags)
    starts: list[float] = []
    time, delay = 0.0, _DEFAULT_DELAY_S
    while True:
        kind = _take(part, file, 1)[0]
        if kind == 0x3B:  # trailer
            return GifBlocks(width, height, tuple(starts), time)
        if kind == 0x21:  # extension
            delay = _extension(part, file, delay)
        elif kind == 0x2C:  # image
            if len(starts) == max_frames:
                raise LimitError(part.name, f"more than {max_frames:,} frames, the limit (video_frames)")
            left, top, frame_w, frame_h, flags = struct.unpack("<HHHHB", _take(part, file, 9))
            # Pillow widens the canvas for a frame that reaches beyond it; the limits must see that
            width, height = max(width, left + frame_w), max(height, top + frame_h)
            _skip_palette(part, file, flags)
            _take(part, file, 1)  # LZW code size
            _skip_blocks(part, file)
            starts.append(time)
            time, delay = time + delay, _DEFAULT_DELAY_S
        else:
            raise CorruptMediaError(part.name, f"is damaged: byte {file.tell() - 1:,} starts no GIF block")


def _extension(part: Media, file: BinaryIO, delay: float) -> float:
    """Skip an extension; of a graphic control the delay is read."""
    if _take(part, file, 1)[0] != 0xF9:
        _skip_blocks(part, file)
        return delay
    block = _take(part, file, _take(part, file, 1)[0])
    _skip_blocks(part, file)
    hundredths = int.from_bytes(block[1:3], "little")
    return hundredths / 100 if hundredths else _DEFAULT_DELAY_S


def _skip_palette(part: Media, file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        _take(part, file, 3 << ((flags & 7) + 1))


def _skip_blocks(part: Media, file: BinaryIO) -> None:
    while length := _take(part, file, 1)[0]:
        _take(part, file, length)


def _take(part: Media, file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise CorruptMediaError(part.name, f"is truncated: the GIF ends at byte {file.tell():,}, before its end mark")
    return data
