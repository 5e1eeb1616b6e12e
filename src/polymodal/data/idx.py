"""The IDX format of the MNIST files: a strict reader that says what is wrong with a file."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import DataError

_UINT8 = 0x08
_MAX_VALUES = 1 << 30


def read_idx(path: Path, num_axes: int) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes, gzip-compressed or not.

    Args:
        path: the file.
        num_axes: 1 for labels ``[N]``, 3 for images ``[N, H, W]``.

    Raises:
        DataError: if the file is missing, damaged, truncated, longer than its header says, or holds another type.

    Source: LeCun, Cortes, Burges, THE MNIST DATABASE, section "The IDX file format".
    """
    data = _bytes(path)
    header = 4 + 4 * num_axes
    magic = bytes([0, 0, _UINT8, num_axes])
    if data[:4] != magic:
        raise DataError(
            f"{path}: found magic number {data[:4].hex()!r}, expected {magic.hex()!r} "
            f"(IDX, unsigned bytes, {num_axes} axes); is this the right file?"
        )
    if len(data) < header:
        raise DataError(f"{path}: found a header of {len(data)} bytes, expected {header}; the file is truncated")
    shape = struct.unpack(f">{num_axes}I", data[4:header])
    size = math.prod(shape)
    if not 0 < size <= _MAX_VALUES:
        raise DataError(f"{path}: found shape {shape}, expected 1 to {_MAX_VALUES:,} values")
    if len(data) - header != size:
        problem = "truncated" if len(data) - header < size else "followed by something else"
        raise DataError(
            f"{path}: found {len(data) - header:,} bytes of data, expected {size:,} for shape {shape}; "
            f"the file is {problem}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _bytes(path: Path) -> bytes:
    limit = _MAX_VALUES + 64
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not is_gzip:
                return file.read(limit)
            with gzip.open(file) as unpacked:
                return unpacked.read(limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}; fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
