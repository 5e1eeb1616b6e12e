"""Sensor CSV: an optional ``# rate_hz: 50`` line, one row of channel names, then rows of numbers."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError
from polymodal.modalities.raw import num_text_lines, parse_table

_RATE = re.compile(r"#\s*rate_hz\s*[:=]\s*(\S+)\s*")
_MOST_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CsvLayout:
    """The header of a CSV: ``names`` of all columns, the stated rate, and where the first data row begins."""

    names: tuple[str, ...]
    rate_hz: float | None
    data_start: int
    num_rows: int


def read_csv_layout(data: bytes, name: str) -> CsvLayout:
    """Read the header and count the rows without parsing them.

    Raises:
        CorruptMediaError: if there is no row of names, a name is empty or repeated, or there are no data rows.
    """
    start, rate_hz = 3 if data.startswith(b"\xef\xbb\xbf") else 0, None
    while True:
        stop = data.find(b"\n", start, start + _MOST_HEADER_BYTES)
        if stop < 0:
            raise CorruptMediaError(name, "no data rows: expected a row of channel names and rows of numbers")
        line = _text(data[start:stop], name).strip()
        start = stop + 1
        if line.startswith("#"):
            match = _RATE.fullmatch(line)
            rate_hz = _number(match[1], name, "the rate_hz line") if match else rate_hz
        elif line:
            break
    names = tuple(word.strip() for word in next(csv.reader([line])))
    if all(_is_number(word) for word in names):
        raise CorruptMediaError(name, f"the first row is {line[:60]!r}; expected channel names, as in 'time,x,y,z'")
    if "" in names or len(set(names)) != len(names):
        raise CorruptMediaError(name, f"the header names {list(names)}; expected distinct, non-empty names")
    num_rows = num_text_lines(data[start:])
    if num_rows == 0:
        raise CorruptMediaError(name, "no data rows below the channel names")
    return CsvLayout(names, rate_hz, start, num_rows)


def edge_times(data: bytes, layout: CsvLayout, column: int, name: str) -> tuple[float, float]:
    """The times in the first and the last data row, in seconds.

    Raises:
        CorruptMediaError: if either is missing or no number.
    """
    body = data[layout.data_start :].strip()
    first = re.split(rb"[\r\n]", body[:_MOST_HEADER_BYTES], maxsplit=1)[0]
    last = re.split(rb"[\r\n]", body[-_MOST_HEADER_BYTES:])[-1]
    values = []
    for line, row in ((first, 1), (last, layout.num_rows)):
        words = _text(line, name).split(",")
        word = words[column] if column < len(words) else ""
        values.append(_number(word, name, f"the time in data row {row}"))
    return values[0], values[1]


def read_csv_rows(data: bytes, layout: CsvLayout, name: str) -> NDArray[np.float64]:
    """All data rows, ``[rows, columns]`` float64.

    Raises:
        CorruptMediaError: if a row is ragged or a field is no number; says which data row, from 1.
    """
    lines = _text(data[layout.data_start :], name).splitlines()
    return parse_table(lines, name, columns=len(layout.names), rows=layout.num_rows, delimiter=",")


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptMediaError(name, f"is not UTF-8 text (byte {data[error.start]:#04x})") from None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _number(word: str, name: str, where: str) -> float:
    if not _is_number(word) or not math.isfinite(float(word)):
        raise CorruptMediaError(name, f"{where} is {word.strip()[:40]!r}; expected a finite number")
    return float(word)
