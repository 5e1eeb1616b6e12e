"""Points in text: tables of numbers (XYZ, ASCII PLY) and the vertices of Wavefront OBJ."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, UnsupportedMediaError
from polymodal.modalities.raw import parse_table

_VERTEX = re.compile(rb"^[ \t]*v[ \t]+([^\r\n]*)", re.MULTILINE)


def read_xyz(data: bytes, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """``x y z`` or ``x y z r g b`` a line; ``#`` starts a comment. Colours above 1 are taken as 0..255.

    Raises:
        CorruptMediaError: as ``parse_table`` does.
        UnsupportedMediaError: if rows hold another number of columns.
    """
    table = parse_table(xyz_lines(data), name)
    if table.shape[1] not in (3, 6):
        raise UnsupportedMediaError(name, f"rows hold {table.shape[1]} numbers; expected 'x y z' or 'x y z r g b'")
    return table[:, :3], _colours(table[:, 3:])


def xyz_lines(data: bytes) -> list[str]:
    """The lines that hold points."""
    lines = (line.partition("#")[0].strip() for line in data.decode("latin-1").splitlines())
    return [line for line in lines if line]


def read_obj(data: bytes, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The vertices of an OBJ file, ``v x y z`` or ``v x y z r g b``; faces are not read.

    A fourth number alone is the weight w of the format and is not used. Colours above 1 are taken as 0..255.

    Raises:
        CorruptMediaError: if there are no vertices or a vertex line is not numeric.
        UnsupportedMediaError: if vertices hold another number of columns.
    """
    lines = [line.decode("latin-1").partition("#")[0] for line in _VERTEX.findall(data)]
    if not lines:
        raise CorruptMediaError(name, "has no vertex lines ('v x y z')")
    table = parse_table(lines, name, rows=len(lines))
    if table.shape[1] not in (3, 4, 6):
        raise UnsupportedMediaError(name, f"vertices hold {table.shape[1]} numbers; expected 3, 4 or 6")
    return table[:, :3], _colours(table[:, 3:]) if table.shape[1] == 6 else None


def probe_obj(data: bytes) -> tuple[int, int]:
    """How many vertices there are, and how many numbers the first one holds."""
    first = _VERTEX.search(data)
    count = sum(1 for _ in _VERTEX.finditer(data))
    return count, len(first[1].partition(b"#")[0].split()) if first else 0


def _colours(rgb: NDArray[np.float64]) -> NDArray[np.float64] | None:
    if rgb.shape[1] == 0:
        return None
    return rgb / 255.0 if rgb.max() > 1.0 else rgb
