"""What the points and sensor readers share: first bytes, NPY without trust in its header, tables of numbers."""

from __future__ import annotations

import io
import math
import re
import struct
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, LimitError, UnsupportedMediaError
from polymodal.core.parts import Media, check_file

_ROW = re.compile(r"at row (\d+)")
NPY_MAGIC = b"\x93NUMPY"
_HEADER_ERRORS = (
    ValueError, SyntaxError, TypeError, KeyError, EOFError, OverflowError, MemoryError, RecursionError,
    struct.error, tokenize.TokenError,
)  # fmt: skip


def read_head(part: Media, num_bytes: int, max_bytes: int) -> tuple[bytes, int]:
    """The first ``num_bytes`` of a path or bytes source, and the size of the whole in bytes.

    Raises:
        MediaError: as :meth:`Media.read_bytes` does.
    """
    if part.path is None:
        data = part.read_bytes(max_bytes)
        return data[:num_bytes], len(data)
    size = check_file(part.path, part.name, max_bytes)
    try:
        with part.path.open("rb") as file:
            return file.read(num_bytes), size
    except OSError as error:
        raise CorruptMediaError(part.name, f"cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """Shape and layout of an NPY file; ``data_start`` is the offset of its first value in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    data_start: int


def read_npy_header(head: bytes, size: int, name: str) -> NpyHeader:
    """Read the header of an NPY file of ``size`` bytes whose first bytes are ``head``.

    Raises:
        CorruptMediaError: if the header is damaged or promises more values than there are bytes.
        UnsupportedMediaError: if the values are not real numbers (object arrays are never unpickled).
    """
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except _HEADER_ERRORS as error:
        raise CorruptMediaError(name, f"the NPY header cannot be read ({str(error)[:120]})") from None
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise UnsupportedMediaError(name, f"an NPY array of {dtype}; expected integers or floats of at most 64 bits")
    if any(side < 0 for side in shape):
        raise CorruptMediaError(name, f"the NPY header states the shape {shape}")
    need, have = math.prod(shape) * dtype.itemsize, size - file.tell()
    if need > have:
        raise CorruptMediaError(
            name, f"the NPY header promises shape {shape} ({need:,} bytes), the file holds {have:,}; it is truncated"
        )
    return NpyHeader(tuple(shape), dtype, bool(is_fortran), file.tell())


def read_npy(data: bytes, name: str) -> NDArray[Any]:
    """The array of an NPY file; nothing is allocated before the size is proven.

    Raises:
        MediaError: as :func:`read_npy_header` does.
    """
    header = read_npy_header(data, len(data), name)
    values = np.frombuffer(data, header.dtype, math.prod(header.shape), header.data_start)
    return values.reshape(header.shape, order="F" if header.is_fortran else "C")


def check_count(name: str, what: str, found: int, limit: int, field: str) -> None:
    """Refuse a count above a limit.

    Raises:
        LimitError: if ``found`` exceeds ``limit``.
    """
    if found > limit:
        raise LimitError(name, f"{found:,} {what}, the limit ({field}) is {limit:,}")


def num_text_lines(data: bytes) -> int:
    """How many lines of ``data`` are not blank, without splitting it where that can be avoided."""
    text = data.replace(b"\r\n", b"\n").strip()
    if not text:
        return 0
    if b"\n\n" in text or b"\n " in text or b"\n\t" in text or b"\r" in text:
        return sum(1 for line in text.splitlines() if line.strip())
    return text.count(b"\n") + 1


def parse_table(
    lines: Sequence[str],
    name: str,
    columns: int | None = None,
    rows: int | None = None,
    delimiter: str | None = None,
) -> NDArray[np.float64]:
    """Parse lines of numbers into ``[rows, columns]`` float64; blank lines are skipped.

    Args:
        lines: the text lines.
        name: what messages call the item.
        columns: how many numbers a row holds, where a header says so.
        rows: how many rows there are, where a header says so.
        delimiter: what stands between numbers; None for white space.

    Raises:
        CorruptMediaError: if a row is ragged or not numeric (says which, from 1), or rows are missing.
    """
    if not any(line.strip() for line in lines):
        raise CorruptMediaError(name, "has no rows of numbers")
    try:
        table: NDArray[np.float64] = np.loadtxt(lines, np.float64, comments=None, delimiter=delimiter, ndmin=2)
    except ValueError as error:
        message = str(error).split(";")[0].rstrip(".")
        # numpy counts conversion errors from 0 and changes of width from 1; messages here count from 1.
        first = 1 if "could not convert" in message else 0
        message = _ROW.sub(lambda match: f"in data row {int(match[1]) + first}", message)
        raise CorruptMediaError(name, f"{message[:200]}; expected the same number of numbers in every row") from None
    if columns is not None and table.shape[1] != columns:
        raise CorruptMediaError(name, f"data rows hold {table.shape[1]} numbers, the header names {columns}")
    if rows is not None and table.shape[0] != rows:
        raise CorruptMediaError(name, f"{table.shape[0]:,} data rows, the header promises {rows:,}; it is truncated")
    return table
