"""Sensor recordings from any source: one place that tells the formats apart and checks what they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Part, Sensor
from polymodal.modalities.raw import NPY_MAGIC, check_count, read_head, read_npy, read_npy_header
from polymodal.modalities.sensor.clock import check_times, rate_of_times, settle_rate, time_column
from polymodal.modalities.sensor.csvfile import edge_times, read_csv_layout, read_csv_rows
from polymodal.modalities.sensor.parquet import read_parquet, read_parquet_layout

_HEAD_BYTES = 65_536
_PARQUET_MAGIC = b"PAR1"
LARGEST_VALUE = 1e30
"""Values beyond this are refused: they are damage, and float32 could not scale them."""


@dataclass(frozen=True, slots=True)
class SensorHeader:
    """What is known before decoding; ``channels`` leaves the time column out, None where nothing names them."""

    num_rows: int
    num_channels: int
    rate_hz: float
    channels: tuple[str, ...] | None
    format: str

    @property
    def duration_s(self) -> float:
        """Length in seconds: every row stands for one period."""
        return self.num_rows / self.rate_hz


@dataclass(frozen=True, slots=True)
class _Columns:
    """A table of the file: all its columns, time included."""

    names: tuple[str, ...]
    values: NDArray[np.float64]


def probe_sensor(part: Part, limits: Limits) -> SensorHeader:
    """Rows, rate and channels from the header, from counting rows (CSV), and from the first and last time.

    Raises:
        MediaError: if the header is damaged, tells no rate, or states more than the limits allow.
    """
    part = _sensor(part)
    if isinstance(part.source, np.ndarray):
        rows, columns = _array_size(part.source.shape, part.name)
        return _named_by_part(part, rows, columns, "array", limits)
    head, size = read_head(part, _HEAD_BYTES, limits.file_bytes)
    format = _format(part, head)
    if format == "npy":
        rows, columns = _array_size(read_npy_header(head, size, part.name).shape, part.name)
        return _named_by_part(part, rows, columns, "npy", limits)
    if format == "parquet":
        return _probe_parquet(part, limits)
    data = part.read_bytes(limits.file_bytes)
    layout = read_csv_layout(data, part.name)
    clock = time_column(layout.names)
    _check_size(part.name, layout.num_rows, len(layout.names) - (clock is not None), limits)
    shown = None
    if clock is not None:
        shown = rate_of_times(*edge_times(data, layout, clock, part.name), layout.num_rows, part.name)
    return _named_by_file(part, layout.names, layout.num_rows, (shown, layout.rate_hz), "csv")


def decode_sensor(part: Part, limits: Limits) -> tuple[NDArray[np.float32], float, tuple[str, ...] | None]:
    """Decode a recording.

    Args:
        part: a ``Sensor`` part from a path, bytes, or an array ``[T, C]`` (or ``[T]``, one channel) with ``rate_hz``.
        limits: what to refuse.

    Returns:
        values float32 ``[T, C]`` without the time column, rate in Hz, and channel names (None if nothing names them).

    Raises:
        MediaError: if the source is damaged, empty, not finite, ragged, not uniform in time, or above the limits.
    """
    part = _sensor(part)
    header = probe_sensor(part, limits)
    if header.format == "array":
        values = _as_matrix(part.source, part.name)
    elif header.format == "npy":
        values = _as_matrix(read_npy(part.read_bytes(limits.file_bytes), part.name), part.name)
    else:
        table = _read_table(part, header, limits)
        clock = time_column(table.names)
        values = table.values
        if clock is not None:
            check_times(values[:, clock], part.name)
            values = np.delete(values, clock, axis=1)
    if values.shape != (header.num_rows, header.num_channels):
        raise CorruptMediaError(
            part.name, f"the header promises {header.num_rows:,} rows of {header.num_channels} channels, the content "
            f"has shape {values.shape}; it is truncated or its header is wrong"
        )  # fmt: skip
    return _checked(values, part.name), header.rate_hz, header.channels


def _sensor(part: Part) -> Sensor:
    if not isinstance(part, Sensor):
        raise UnsupportedMediaError(getattr(part, "name", part.modality), f"a part of {part.modality}; expected sensor")
    return part


def _format(part: Sensor, head: bytes) -> str:
    extension = part.path.suffix.lower() if part.path is not None else ""
    if head.startswith(NPY_MAGIC):
        return "npy"
    if head.startswith(_PARQUET_MAGIC):
        return "parquet"
    if extension in (".npy", ".parquet"):
        raise CorruptMediaError(part.name, f"is called {extension}, but begins with {head[:8]!r}: it is no such file")
    return "csv"


def _array_size(shape: tuple[int, ...], name: str) -> tuple[int, int]:
    if len(shape) not in (1, 2):
        raise UnsupportedMediaError(name, f"an array of shape {shape}; expected [T, C], or [T] for one channel")
    return shape[0], shape[1] if len(shape) == 2 else 1


def _as_matrix(array: NDArray[Any], name: str) -> NDArray[np.float64]:
    if array.dtype.kind not in "fiu":
        raise UnsupportedMediaError(name, f"an array of {array.dtype}; expected integers or floats")
    with np.errstate(all="ignore"):  # Damaged values are named later.
        values = array.astype(np.float64)
    return values[:, None] if values.ndim == 1 else values


def _named_by_part(part: Sensor, rows: int, columns: int, format: str, limits: Limits) -> SensorHeader:
    _check_size(part.name, rows, columns, limits)
    if part.channels is not None and len(part.channels) != columns:
        raise CorruptMediaError(part.name, f"{columns} columns, but the part names channels {list(part.channels)}")
    return SensorHeader(rows, columns, settle_rate(None, part.rate_hz, part.name), part.channels, format)


def _named_by_file(
    part: Sensor, names: tuple[str, ...], rows: int, rates: tuple[float | None, float | None], format: str
) -> SensorHeader:
    clock = time_column(names)
    channels = tuple(name for i, name in enumerate(names) if i != clock)
    if part.channels is not None and part.channels != channels:
        raise CorruptMediaError(
            part.name, f"the file names channels {list(channels)}, the part {list(part.channels)}; expected the same"
        )
    shown, in_file = rates
    stated = in_file if part.rate_hz is None else part.rate_hz
    if in_file is not None and part.rate_hz is not None:
        settle_rate(in_file, part.rate_hz, part.name)
    return SensorHeader(rows, len(channels), settle_rate(shown, stated, part.name), channels, format)


def _check_size(name: str, rows: int, columns: int, limits: Limits) -> None:
    if rows == 0 or columns == 0:
        raise CorruptMediaError(name, f"{rows} rows of {columns} channels; expected at least one of each")
    check_count(name, "rows", rows, limits.sensor_rows, "sensor_rows")
    check_count(name, "channels", columns, limits.sensor_channels, "sensor_channels")


def _checked(values: NDArray[np.float64], name: str) -> NDArray[np.float32]:
    # NaN fails the comparison too.
    is_good = (np.abs(values) <= LARGEST_VALUE).all(axis=1)
    if not is_good.all():
        row = int(np.argmin(is_good))
        raise CorruptMediaError(
            name, f"{int((~is_good).sum()):,} of {len(values):,} data rows are NaN, infinite or beyond "
            f"{LARGEST_VALUE:g}, the first is data row {row + 1}: {values[row].tolist()[:8]}; expected finite numbers"
        )  # fmt: skip
    return np.ascontiguousarray(values, dtype=np.float32)


def _read_table(part: Sensor, header: SensorHeader, limits: Limits) -> _Columns:
    data = part.read_bytes(limits.file_bytes)
    if header.format == "parquet":
        names, values = read_parquet(data, part.name)
        return _Columns(names, values)
    layout = read_csv_layout(data, part.name)
    return _Columns(layout.names, read_csv_rows(data, layout, part.name))


def _probe_parquet(part: Sensor, limits: Limits) -> SensorHeader:
    layout = read_parquet_layout(part.read_bytes(limits.file_bytes), part.name)
    clock = time_column(layout.names)
    _check_size(part.name, layout.num_rows, len(layout.names) - (clock is not None), limits)
    shown = None
    if clock is not None:
        shown = rate_of_times(*layout.edge_times(layout.names[clock]), layout.num_rows, part.name)
    return _named_by_file(part, layout.names, layout.num_rows, (shown, layout.rate_hz), "parquet")
