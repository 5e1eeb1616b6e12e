"""Whether a WAV or Ogg file is whole: its own structure must end where the file does.

The decoder behind ``soundfile`` shortens a truncated file in silence; these checks read a few bytes and do not.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from polymodal.core.errors import CorruptMediaError
from polymodal.core.parts import Audio

_STREAMED = 0x7FFFF000
"""Sizes from here on are written by recorders that did not know the length and could not go back."""
_OGG_PAGE_BYTES = 65_307
"""Largest page that the format allows."""


def check_wav(part: Audio, file: BinaryIO, size: int) -> None:
    """Walk the chunks of a RIFF/RF64 file: the data chunk must end within it.

    Raises:
        CorruptMediaError: if it does not, or there is none.
    """
    file.seek(0)
    order = ">" if file.read(4) == b"RIFX" else "<"
    place, long_bytes = 12, None
    while place + 8 <= size:
        file.seek(place)
        kind, length = struct.unpack(f"{order}4sI", file.read(8))
        if kind == b"ds64" and place + 24 <= size:
            long_bytes = int(struct.unpack("<8xQ", file.read(16))[0])
        if kind == b"data":
            if length >= _STREAMED:
                length = long_bytes if long_bytes is not None else 0
            _expect_end(part, place + 8 + length, size)
            return
        place += 8 + length + length % 2
    raise CorruptMediaError(part.name, f"is truncated or damaged: no data chunk in the {size:,} bytes of this WAV file")


def check_ogg(part: Audio, file: BinaryIO, size: int) -> None:
    """The last page must end with the file and carry the end-of-stream mark.

    Raises:
        CorruptMediaError: if it does not.
    """
    start = max(0, size - _OGG_PAGE_BYTES)
    file.seek(start)
    tail = file.read()
    place = tail.rfind(b"OggS")
    if place < 0 or place + 27 > len(tail):
        raise CorruptMediaError(part.name, "is truncated or damaged: the last Ogg page is not whole")
    is_last = bool(tail[place + 5] & 4)
    table_end = place + 27 + tail[place + 26]
    _expect_end(part, start + table_end + sum(tail[place + 27 : table_end]), size)
    if not is_last:
        raise CorruptMediaError(part.name, "is truncated: its last Ogg page is not marked as the end of the stream")


def _expect_end(part: Audio, end: int, size: int) -> None:
    if end > size:
        raise CorruptMediaError(
            part.name, f"is truncated: its structure needs {end:,} bytes, the file has {size:,}; fetch it again"
        )
