"""Points from any source: one place that tells the formats apart and checks what they give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Media, Part
from polymodal.modalities.points.las import HEADER_BYTES, read_las, read_las_header
from polymodal.modalities.points.ply import MAX_HEADER_BYTES, check_ply_size, read_ply, read_ply_header
from polymodal.modalities.points.table import probe_obj, read_obj, read_xyz, xyz_lines
from polymodal.modalities.raw import NPY_MAGIC, check_count, read_head, read_npy, read_npy_header

_MAGIC = {b"ply": "ply", NPY_MAGIC: "npy", b"LASF": "las"}
_EXTENSIONS = {".ply": "ply", ".npy": "npy", ".las": "las", ".laz": "las", ".obj": "obj"}
_OBJ_WORDS = frozenset(["v", "vn", "vt", "vp", "f", "l", "o", "g", "s", "mtllib", "usemtl"])
LARGEST_COORDINATE = 1e18
"""Coordinates beyond this are refused: their squares would leave the range of float32."""


@dataclass(frozen=True, slots=True)
class PointsHeader:
    """What is known before decoding: ``format`` is one of ply, obj, las, xyz, npy, array."""

    num_points: int
    has_colour: bool
    format: str


def probe_points(part: Part, limits: Limits) -> PointsHeader:
    """The size of a cloud from its header; for OBJ and XYZ, which have none, from counting lines.

    Raises:
        MediaError: if the source is unreadable, holds no points or more than the limits allow.
    """
    part = _media(part)
    if isinstance(part.source, np.ndarray):
        num_points, has_colour = _array_size(part.source.shape, part.name)
        return _checked(PointsHeader(num_points, has_colour, "array"), part.name, limits)
    head, size = read_head(part, MAX_HEADER_BYTES, limits.file_bytes)
    format = _format(part, head)
    if format == "ply":
        ply = read_ply_header(head, part.name)
        header = _checked(PointsHeader(ply.vertex.count, ply.colour_names is not None, "ply"), part.name, limits)
        check_ply_size(ply, size, part.name)
        return header
    if format == "las":
        las = read_las_header(head[:HEADER_BYTES], size, part.name)
        return _checked(PointsHeader(las.num_points, las.has_colour, "las"), part.name, limits)
    if format == "npy":
        num_points, has_colour = _array_size(read_npy_header(head, size, part.name).shape, part.name)
        return _checked(PointsHeader(num_points, has_colour, "npy"), part.name, limits)
    data = part.read_bytes(limits.file_bytes)
    if format == "obj":
        num_points, columns = probe_obj(data)
    else:
        lines = xyz_lines(data)
        num_points, columns = len(lines), len(lines[0].split()) if lines else 0
    return _checked(PointsHeader(num_points, columns == 6, format), part.name, limits)


def decode_points(part: Part, limits: Limits) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Decode a cloud.

    Args:
        part: a ``Points`` part from a path, bytes, or a float array ``[N, 3]`` / ``[N, 6]``.
        limits: what to refuse.

    Returns:
        xyz float32 ``[N, 3]`` in the file's units, and rgb float32 ``[N, 3]`` in 0..1 or None.

    Raises:
        MediaError: if the source is damaged, empty, not finite, in an unknown layout, or above the limits.
    """
    xyz, rgb = load_cloud(part, limits)
    return xyz.astype(np.float32), None if rgb is None else rgb.astype(np.float32)


def load_cloud(part: Part, limits: Limits) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """As :func:`decode_points`, in float64: survey coordinates in the millions lose centimetres in float32.

    Raises:
        MediaError: as :func:`decode_points` does.
    """
    part = _media(part)
    header = probe_points(part, limits)
    # Damaged values may overflow on the way; the checks below name them.
    with np.errstate(all="ignore"):
        xyz, rgb = _load(part, header, limits)
    if len(xyz) != header.num_points:
        raise CorruptMediaError(part.name, f"{len(xyz):,} points, the header promises {header.num_points:,}")
    _check_values(xyz, part.name)
    return xyz, _check_colours(rgb, part.name)


def _load(part: Media, header: PointsHeader, limits: Limits) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    if header.format == "array":
        return _split(part.source)
    data = part.read_bytes(limits.file_bytes)
    if header.format == "ply":
        return read_ply(data, read_ply_header(data[:MAX_HEADER_BYTES], part.name), part.name)
    if header.format == "las":
        return read_las(data, read_las_header(data[:HEADER_BYTES], len(data), part.name), part.name)
    if header.format == "npy":
        return _split(read_npy(data, part.name))
    return read_obj(data, part.name) if header.format == "obj" else read_xyz(data, part.name)


def _media(part: Part) -> Media:
    if not isinstance(part, Media) or part.modality != "points":
        raise UnsupportedMediaError(getattr(part, "name", part.modality), f"a part of {part.modality}; expected points")
    return part


def _format(part: Media, head: bytes) -> str:
    found = next((format for magic, format in _MAGIC.items() if head.startswith(magic)), None)
    extension = part.path.suffix.lower() if part.path is not None else ""
    claimed = _EXTENSIONS.get(extension)
    if found is not None:
        return found
    if claimed in _MAGIC.values():
        raise CorruptMediaError(part.name, f"is called {extension}, but begins with {head[:8]!r}: it is no such file")
    if claimed == "obj":
        return "obj"
    lines = (line.split() for line in head.decode("latin-1").splitlines())
    first = next((words[0] for words in lines if words and not words[0].startswith("#")), "")
    return "obj" if first in _OBJ_WORDS else "xyz"


def _array_size(shape: tuple[int, ...], name: str) -> tuple[int, bool]:
    if len(shape) != 2 or shape[1] not in (3, 6):
        raise UnsupportedMediaError(name, f"an array of shape {shape}; expected [N, 3] xyz or [N, 6] xyz + rgb in 0..1")
    return shape[0], shape[1] == 6


def _split(array: NDArray[np.generic]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    values = array.astype(np.float64)
    return values[:, :3], values[:, 3:] if values.shape[1] == 6 else None


def _checked(header: PointsHeader, name: str, limits: Limits) -> PointsHeader:
    if header.num_points == 0:
        raise CorruptMediaError(name, "has no points; expected at least one")
    check_count(name, "points", header.num_points, limits.points, "points")
    return header


def _check_values(xyz: NDArray[np.float64], name: str) -> None:
    is_finite = np.isfinite(xyz).all(axis=1)
    if not is_finite.all():
        raise CorruptMediaError(
            name, f"{int((~is_finite).sum()):,} of {len(xyz):,} points are NaN or infinite, the first is point "
            f"{int(np.argmin(is_finite)) + 1}; expected finite coordinates"
        )  # fmt: skip
    if (largest := float(np.abs(xyz).max())) > LARGEST_COORDINATE:
        raise CorruptMediaError(name, f"a coordinate of {largest:.3g}; expected at most {LARGEST_COORDINATE:g}")


def _check_colours(rgb: NDArray[np.float64] | None, name: str) -> NDArray[np.float64] | None:
    if rgb is None:
        return None
    # NaN fails the comparison too. The tolerance allows for colours that were rounded when they were written.
    is_good = ((rgb >= -1e-3) & (rgb <= 1.001)).all(axis=1)
    if not is_good.all():
        row = int(np.argmin(is_good))
        raise CorruptMediaError(name, f"point {row + 1} has the colour {rgb[row].tolist()}; expected values in 0..1")
    return np.clip(rgb, 0.0, 1.0)
