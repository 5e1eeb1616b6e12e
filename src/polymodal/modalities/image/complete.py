"""Whether a PNG or GIF file is whole: Pillow is content once it has the pixels that it was asked for."""

from __future__ import annotations

import struct
from typing import BinaryIO

from polymodal.core.errors import CorruptMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Image
from polymodal.modalities.image.gif import scan_gif


def check_complete(part: Image, file: BinaryIO, limits: Limits) -> None:
    """Walk the blocks of a PNG or GIF to their end mark; other formats pass. The file is left at its start.

    Raises:
        CorruptMediaError: if the file ends first.
        LimitError: if a GIF has more frames than ``video_frames``.
    """
    head = file.read(8)
    if head == b"\x89PNG\r\n\x1a\n":
        _check_png(part, file)
    elif head[:6] in (b"GIF87a", b"GIF89a"):
        scan_gif(part, file, limits.video_frames)
    file.seek(0)


def _check_png(part: Image, file: BinaryIO) -> None:
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        file.seek(length, 1)
        if len(file.read(4)) == 4 and kind == b"IEND":
            return
    raise CorruptMediaError(part.name, "is truncated: the PNG ends before its end mark (IEND); fetch it again")
