"""A GIF writer for frames that are palette indices already: exact colours, every frame whole, no palette search.

The general writer of Pillow spends its time on comparing and re-colouring frames. This one has Pillow's encoder
compress each frame (codes of 8 bits to begin with), and joins the compressed blocks under one palette.

Source: CompuServe, Graphics Interchange Format, Version 89a (sections 17 to 27 and appendix E).
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polymodal.core.errors import DataError

_CODE_SIZE = b"\x08"


def encode_gif(frames: NDArray[np.uint8], palette: NDArray[np.uint8], fps: float) -> bytes:
    """A GIF that shows the frames once.

    Args:
        frames: palette indices, uint8 ``[F, H, W]``.
        palette: sRGB, uint8 ``[N, 3]`` with N of at most 256.
        fps: frames per second; a GIF counts in hundredths of a second, so 100 / fps is rounded.

    Raises:
        DataError: if an index is outside the palette.
    """
    if frames.size == 0 or int(frames.max()) >= len(palette) or len(palette) > 256:
        raise DataError(
            f"GIF: found frames {frames.shape} and a palette of {len(palette)} colours; "
            "expected at least one frame, at most 256 colours and every index inside the palette"
        )
    bits = max(1, (len(palette) - 1).bit_length())
    height, width = frames.shape[1:]
    table = palette.astype(np.uint8).tobytes().ljust(3 * 2**bits, b"\0")
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0xF0 | (bits - 1), 0, 0), table]
    control = b"\x21\xf9\x04" + struct.pack("<BHBB", 0x04, round(100 / fps), 0, 0)
    descriptor = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0)
    for frame in frames:
        parts += [control, descriptor, _compressed(frame)]
    return b"".join([*parts, b"\x3b"])


def _compressed(frame: NDArray[np.uint8]) -> bytes:
    """The code size and the data blocks of one frame."""
    return _CODE_SIZE + Image.fromarray(frame).tobytes("gif", "L", 8, 0) + b"\0"
