"""PLY vertices: ASCII and binary of either byte order, through one numpy structured dtype."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, UnsupportedMediaError
from polymodal.modalities.raw import parse_table

MAX_HEADER_BYTES = 65_536
_ORDERS = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_COLOURS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))


@dataclass(slots=True)
class Element:
    """One element of a PLY header: its name, how many there are, and its properties as ``(name, type)``."""

    name: str
    count: int
    properties: list[tuple[str, str]]
    has_lists: bool = False


@dataclass(frozen=True, slots=True)
class PlyHeader:
    """What stands before the data; ``before`` are the elements that precede the vertices."""

    format: str
    vertex: Element
    before: tuple[Element, ...]
    data_start: int

    @property
    def colour_names(self) -> tuple[str, str, str] | None:
        """The vertex properties that hold red, green and blue."""
        names = {name for name, _ in self.vertex.properties}
        return next((colours for colours in _COLOURS if names.issuperset(colours)), None)

    def dtype(self, element: Element) -> np.dtype[np.void]:
        """The packed layout of one element."""
        return np.dtype([(name, _ORDERS[self.format] + kind) for name, kind in element.properties])


def read_ply_header(head: bytes, name: str) -> PlyHeader:
    """Read a PLY header.

    Raises:
        CorruptMediaError: if a line is not PLY, or there are no vertices with x, y and z.
        UnsupportedMediaError: if a vertex holds lists.
    """
    end = head.find(b"end_header", 0, MAX_HEADER_BYTES)
    stop = head.find(b"\n", end)
    if not head.startswith(b"ply") or end < 0 or stop < 0:
        raise CorruptMediaError(name, "no PLY header: expected 'ply' to 'end_header' in the first 64 KiB")
    format, elements = "", []
    for line in head[:end].decode("latin-1").splitlines()[1:]:
        words = line.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        try:
            if words[0] == "format" and words[1] in _ORDERS:
                format = words[1]
            elif words[0] == "element":
                elements.append(Element(words[1], _count(words[2]), []))
            elif words[0] == "property":
                _add_property(elements[-1], words)
            else:
                raise ValueError
        except (ValueError, IndexError, KeyError):
            raise CorruptMediaError(name, f"the PLY header line {line[:80]!r} is not valid") from None
    if not format:
        raise CorruptMediaError(name, f"the PLY header has no 'format' line; expected one of {', '.join(_ORDERS)}")
    place = next((i for i, element in enumerate(elements) if element.name == "vertex"), None)
    if place is None:
        raise CorruptMediaError(name, "the PLY header has no element 'vertex'")
    vertex = elements[place]
    names = [property for property, _ in vertex.properties]
    if not {"x", "y", "z"}.issubset(names) or len(set(names)) != len(names):
        raise CorruptMediaError(name, f"PLY vertices hold {names}; expected x, y and z, each property once")
    if vertex.has_lists:
        raise UnsupportedMediaError(name, "PLY vertices hold list properties; expected numbers only")
    return PlyHeader(format, vertex, tuple(elements[:place]), stop + 1)


def _count(word: str) -> int:
    if not word.isascii() or not word.isdigit() or len(word) > 18:
        raise ValueError
    return int(word)


def _add_property(element: Element, words: list[str]) -> None:
    if words[1] == "list":
        element.has_lists = True
        element.properties.append((words[4], _TYPES[words[3]]))
    else:
        element.properties.append((words[2], _TYPES[words[1]]))


def check_ply_size(header: PlyHeader, size: int, name: str) -> None:
    """Prove that a file of ``size`` bytes can hold the vertices that its header promises.

    Raises:
        CorruptMediaError: if it cannot.
        UnsupportedMediaError: if list elements stand before binary vertices.
    """
    need = header.vertex.count * 2 * len(header.vertex.properties)
    if header.format != "ascii":
        need = _binary_start(header, name) - header.data_start + header.vertex.count * _row_bytes(header)
    # The last value of an ASCII file need not be followed by a separator.
    if need - (header.format == "ascii") > size - header.data_start:
        raise CorruptMediaError(
            name, f"the PLY header promises {header.vertex.count:,} vertices, the file ends after {size:,} bytes; "
            "it is truncated or the count is wrong"
        )  # fmt: skip


def _row_bytes(header: PlyHeader) -> int:
    return header.dtype(header.vertex).itemsize


def _binary_start(header: PlyHeader, name: str) -> int:
    if any(element.has_lists for element in header.before):
        raise UnsupportedMediaError(name, "PLY elements with lists stand before the vertices; expected vertices first")
    return header.data_start + sum(element.count * header.dtype(element).itemsize for element in header.before)


def read_ply(data: bytes, header: PlyHeader, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The vertices: xyz ``[N, 3]`` and rgb ``[N, 3]`` in 0..1 for integer colours, as stored for float ones.

    Raises:
        CorruptMediaError: if there are fewer vertices than promised, or a row is not numeric.
    """
    check_ply_size(header, len(data), name)
    names = [property for property, _ in header.vertex.properties]
    if header.format == "ascii":
        skip = sum(element.count for element in header.before)
        lines = data[header.data_start :].decode("latin-1").splitlines()[skip : skip + header.vertex.count]
        table = parse_table(lines, name, columns=len(names), rows=header.vertex.count)
        column = {property: table[:, i] for i, property in enumerate(names)}
    else:
        start = _binary_start(header, name)
        rows = np.frombuffer(data, header.dtype(header.vertex), header.vertex.count, start)
        column = {property: rows[property] for property in names}
    xyz = np.stack([column[axis] for axis in "xyz"], axis=1).astype(np.float64)
    if header.colour_names is None:
        return xyz, None
    types = dict(header.vertex.properties)
    channels = []
    for colour in header.colour_names:
        kind = np.dtype(types[colour])
        scale = np.iinfo(kind).max if kind.kind in "iu" else 1.0
        channels.append(column[colour].astype(np.float64) / scale)
    return xyz, np.stack(channels, axis=1)
