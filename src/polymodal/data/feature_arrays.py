"""The arrays that an encoder gave for one item, to bytes and back; the stored form of the feature cache.

Shape legend: ``U`` units of an item, ``N`` features of a unit, ``D`` width, ``P`` pooled width.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import DataError

Storage = Literal["float32", "float16", "bfloat16"]


class Features(NamedTuple):
    """What an encoder gave for one item.

    Args:
        x_UND: float32 features; zero where not valid.
        is_valid_UN: bool, False on padding.
        pooled_UP: float32 pooled vectors, or None where the encoder has none.
    """

    x_UND: NDArray[np.float32]
    is_valid_UN: NDArray[np.bool_]
    pooled_UP: NDArray[np.float32] | None


def encode(
    key: str,
    x_UND: NDArray[Any],
    is_valid_UN: NDArray[Any],
    pooled_UP: NDArray[Any] | None,
    storage: Storage,
) -> tuple[bytes, tuple[int, int, int, int]]:
    """The bytes of one item, and (U, N, D, P); P is 0 without pooled vectors.

    Raises:
        DataError: if shapes do not agree, or a valid value does not fit the storage type.
    """
    found = f"{key}: found features {list(x_UND.shape)}, is_valid {list(is_valid_UN.shape)}"
    if x_UND.ndim != 3 or 0 in x_UND.shape or is_valid_UN.shape != x_UND.shape[:2]:
        raise DataError(f"{found}, expected [U, N, D] with at least one of each, and [U, N]")
    if pooled_UP is not None and (pooled_UP.ndim != 2 or len(pooled_UP) != len(x_UND) or not pooled_UP.shape[1]):
        raise DataError(f"{found}, pooled {list(pooled_UP.shape)}, expected pooled [U, P] with P > 0")
    is_valid = is_valid_UN.astype(np.bool_)
    parts = [np.where(is_valid[..., None], x_UND, 0)]
    if pooled_UP is not None:
        parts.append(pooled_UP)
    blocks = [*(_store(part, key, storage) for part in parts), is_valid.tobytes()]
    return b"".join(blocks), (*x_UND.shape, 0 if pooled_UP is None else pooled_UP.shape[1])


def decode(view: memoryview, shape: tuple[int, int, int, int], storage: Storage) -> Features:
    """The arrays of one item from its bytes; float32 storage is not copied."""
    units, num, width, pooled_width = shape
    kind = np.dtype({"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[storage])
    count = units * (num * width + pooled_width)
    values = np.frombuffer(view, dtype=kind, count=count)
    if storage == "bfloat16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    floats = values.astype(np.float32, copy=False)
    size = math.prod(shape[:3])
    flags = np.frombuffer(view, dtype=np.bool_, offset=count * kind.itemsize)
    pooled = floats[size:].reshape(units, pooled_width) if pooled_width else None
    return Features(floats[:size].reshape(units, num, width), flags.reshape(units, num), pooled)


def _store(values: NDArray[Any], key: str, storage: Storage) -> bytes:
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
        block: NDArray[Any] = floats
        if storage == "float16":
            block = floats.astype(np.float16)
        elif storage == "bfloat16":
            block = _to_bfloat16(floats)
    is_finite = np.isfinite(block) if storage != "bfloat16" else block & 0x7F80 != 0x7F80
    if not is_finite.all():
        largest = float(np.abs(values).max())
        advice = "store them as bfloat16 or float32" if np.isfinite(largest) else "expected finite numbers"
        raise DataError(f"{key}: features do not fit {storage}, the largest magnitude is {largest:g}; {advice}")
    return block.tobytes()


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the floats, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)
