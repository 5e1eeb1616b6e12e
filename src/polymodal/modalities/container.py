"""MP4, WebM, Matroska and AVI files by PyAV: recognised by content, checked for truncation, opened safely.

FFmpeg is always told the format: left to guess, it would follow playlists inside a file to other files and the network.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import av

from polymodal.core.errors import CorruptMediaError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Media
from polymodal.modalities.decoding import named_errors, opened

_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp")
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"


def container_format(head: bytes) -> str | None:
    """FFmpeg's name of the container that a file's first 12 bytes announce; None if it is none that is read."""
    if head[4:8] in _MP4_BOXES:
        return "mov"
    if head[:4] == _EBML:
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return None


@contextmanager
def opened_container(part: Media, limits: Limits, takes: str) -> Iterator[Any]:
    """The part as an open PyAV input container.

    Raises:
        CorruptMediaError: if the file is damaged, or shorter than its own structure says.
        UnsupportedMediaError: if it is no container that is read.
    """
    with opened(part, limits, takes) as (file, size):
        format = container_format(file.read(12))
        if format is None:
            raise UnsupportedMediaError(part.name, f"is no MP4, MOV, WebM, MKV or AVI file; expected {takes}")
        _CHECKS[format](part, file, size)
        file.seek(0)
        # a plain path lets FFmpeg read by itself, which is faster; the prefix keeps "a:b.mp4" from naming a protocol
        source = file if part.path is None else "file:" + os.path.abspath(part.path)
        with named_errors(part, "opening the container"):
            container = av.open(source, format=format, metadata_errors="replace")
        with container:
            yield container


def stream_seconds(stream: Any) -> float | None:
    """Duration of one stream as its header or its ``DURATION`` tag states it; None if neither does."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def packet_seconds(container: Any, stream: Any) -> tuple[float, int]:
    """Duration and number of the packets of a stream, by reading (not decoding) all of them.

    For files whose header does not say, such as a browser's live recordings.
    """
    start = end = None
    count = 0
    for packet in container.demux(stream):
        if packet.size == 0 or packet.pts is None:
            continue
        count += 1
        last = packet.pts + (packet.duration or 0)
        start = packet.pts if start is None else min(start, packet.pts)
        end = last if end is None else max(end, last)
    if start is None or end is None:
        return 0.0, 0
    return float((end - start) * stream.time_base), count


def _truncated(part: Media, expected: int, size: int) -> CorruptMediaError:
    return CorruptMediaError(
        part.name, f"is truncated: its structure needs {expected:,} bytes, the file has {size:,}; fetch it again"
    )


def _check_mp4(part: Media, file: BinaryIO, size: int) -> None:
    """Walk the top-level boxes: each must end within the file."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            raise _truncated(part, place + 8, size)
        length = int(struct.unpack(">I", head[:4])[0])
        if length == 0:  # the last box may say "to the end"
            return
        if length == 1 and len(head) == 16:
            length = int(struct.unpack(">Q", head[8:])[0])
        if length < 8:
            raise CorruptMediaError(part.name, f"is damaged: the MP4 box at byte {place:,} claims {length} bytes")
        place += length
        if place > size:
            raise _truncated(part, place, size)


def _check_matroska(part: Media, file: BinaryIO, size: int) -> None:
    """The EBML header and the segment, where it states its size, must end within the file."""
    file.seek(4)
    head_bytes, width = _ebml_size(file.read(8))
    place = 4 + width + (head_bytes or 0)
    if place + 12 > size:
        raise _truncated(part, place + 12, size)
    file.seek(place)
    if file.read(4) != _SEGMENT:
        raise CorruptMediaError(part.name, f"is damaged: no Matroska segment at byte {place:,}")
    segment_bytes, width = _ebml_size(file.read(8))
    end = place + 4 + width + (segment_bytes or 0)
    if end > size:
        raise _truncated(part, end, size)


def _ebml_size(data: bytes) -> tuple[int | None, int]:
    """An EBML variable-length size, None for "unknown", and how many bytes it takes."""
    if not data or data[0] == 0:
        return None, 8
    width = 9 - data[0].bit_length()
    value = int.from_bytes(data[:width], "big") & ((1 << (7 * width)) - 1)
    return (None if value == (1 << (7 * width)) - 1 else value), width


def _check_avi(part: Media, file: BinaryIO, size: int) -> None:
    file.seek(4)
    end = 8 + int(struct.unpack("<I", file.read(4))[0])
    if end > size:
        raise _truncated(part, end, size)


_CHECKS = {"mov": _check_mp4, "matroska": _check_matroska, "avi": _check_avi}
