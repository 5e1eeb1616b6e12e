"""LAS point records, read through one numpy structured dtype; LAZ is unpacked by lazrs.

The unpacker runs in a process apart (see ``unlaz.py``), which costs some 30 ms a file: turn LAZ into LAS for training.

Source: LAS Specification 1.4 R15, sections 2.4 (public header block) and 2.6 (point data records).
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, MissingExtraError

HEADER_BYTES = 375
_SMALLEST_HEADER = 227
_RGB_OFFSET = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}
_RECORD_BYTES = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)
_MOST_COMPRESSION = 1000
_VLR_HEADER_BYTES = 54
_UNPACK_S = 30.0
_SLOWEST_POINTS_PER_S = 100_000.0


@dataclass(frozen=True, slots=True)
class LasHeader:
    """The fields of a LAS header that reading coordinates and colours needs; sizes in bytes."""

    num_points: int
    point_format: int
    record_bytes: int
    data_start: int
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]
    is_compressed: bool

    @property
    def has_colour(self) -> bool:
        """Whether the point format has red, green and blue."""
        return self.point_format in _RGB_OFFSET


def read_las_header(head: bytes, size: int, name: str) -> LasHeader:
    """Read the header of a LAS or LAZ file of ``size`` bytes.

    Raises:
        CorruptMediaError: if it is cut, has an unknown point format, or promises more points than there are bytes.
    """
    if len(head) < _SMALLEST_HEADER:
        raise CorruptMediaError(name, f"the LAS header is cut after {len(head)} bytes; expected {_SMALLEST_HEADER}")
    minor = head[25]
    (start,) = struct.unpack_from("<I", head, 96)
    format, record, count = struct.unpack_from("<BHI", head, 104)
    if minor >= 4 and len(head) >= HEADER_BYTES:
        (count,) = struct.unpack_from("<Q", head, 247)
    numbers = struct.unpack_from("<6d", head, 131)
    # Bits 6 and 7 of the point format mark LAZ compression.
    base, is_compressed = format & 0x3F, bool(format & 0xC0)
    if base >= len(_RECORD_BYTES) or record < _RECORD_BYTES[base]:
        raise CorruptMediaError(
            name, f"the LAS header states point format {base} with records of {record} bytes; expected a format "
            f"0..10 with records of at least the standard's size"
        )  # fmt: skip
    if not np.isfinite(numbers).all():
        raise CorruptMediaError(name, "the LAS header states a scale or offset that is not finite")
    need = count * record // (_MOST_COMPRESSION if is_compressed else 1)
    if start + need > size:
        raise CorruptMediaError(
            name, f"the LAS header promises {count:,} points of {record} bytes, the file ends after {size:,} bytes; "
            "it is truncated or the count is wrong"
        )  # fmt: skip
    return LasHeader(
        count, base, record, start,
        (numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5]), is_compressed,
    )  # fmt: skip


def read_las(data: bytes, header: LasHeader, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Coordinates ``[N, 3]`` in the file's units, and colours ``[N, 3]`` in 0..1.

    Colours are 16 bit by the standard; a file whose largest value is at most 255 holds 8-bit ones, as many writers do.

    Raises:
        CorruptMediaError: if LAZ data cannot be unpacked.
        MissingExtraError: if the file is LAZ and lazrs is absent.
    """
    if header.is_compressed:
        records = _unpack(data, header, name)
    else:
        records = np.frombuffer(data, _dtype(header), header.num_points, header.data_start)
    xyz = records["xyz"] * np.array(header.scale) + np.array(header.offset)
    if not header.has_colour:
        return xyz, None
    rgb = records["rgb"].astype(np.float64)
    return xyz, rgb / (255.0 if rgb.max(initial=0.0) <= 255.0 else 65_535.0)


def _dtype(header: LasHeader) -> np.dtype[np.void]:
    names, formats, offsets = ["xyz"], ["(3,)<i4"], [0]
    if header.has_colour:
        names, formats, offsets = ["xyz", "rgb"], ["(3,)<i4", "(3,)<u2"], [0, _RGB_OFFSET[header.point_format]]
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": header.record_bytes})


def _unpack(data: bytes, header: LasHeader, name: str) -> NDArray[Any]:
    if importlib.util.find_spec("lazrs") is None:
        raise MissingExtraError("lazrs", "points", "reading LAZ files")
    size = header.num_points * header.record_bytes
    numbers = (header.data_start, *_laszip_record(data, header, name), size)
    program = [sys.executable, "-P", str(Path(__file__).with_name("unlaz.py")), *map(str, numbers)]
    longest_s = _UNPACK_S + header.num_points / _SLOWEST_POINTS_PER_S
    try:
        quiet = {**os.environ, "RUST_BACKTRACE": "0"}
        done = subprocess.run(program, input=data, capture_output=True, timeout=longest_s, check=False, env=quiet)
    except subprocess.TimeoutExpired:
        raise CorruptMediaError(name, f"the LAZ data could not be unpacked within {longest_s:.0f} s") from None
    if done.returncode != 0 or len(done.stdout) != size:
        lines = done.stderr.decode("utf-8", "replace").splitlines()
        lines = [line for line in lines if line and not line.startswith((" ", "note:"))]
        problem = lines[-1][:160] if lines else f"exit code {done.returncode}"
        raise CorruptMediaError(name, f"the LAZ data cannot be unpacked ({problem})")
    return np.frombuffer(done.stdout, _dtype(header))


def _laszip_record(data: bytes, header: LasHeader, name: str) -> tuple[int, int]:
    """Where the variable length record that describes the compression stands, and its length in bytes.

    Its user is ``laszip encoded`` and its id 22204.
    """
    (place,) = struct.unpack_from("<H", data, 94)
    while place + _VLR_HEADER_BYTES <= header.data_start:
        user, kind, length = struct.unpack_from("<2x16sHH", data, place)
        place += _VLR_HEADER_BYTES
        if user.rstrip(b"\0") == b"laszip encoded" and kind == 22_204:
            return place, min(length, header.data_start - place)
        place += length
    raise CorruptMediaError(name, "is marked as LAZ, but has no record that describes the compression")
