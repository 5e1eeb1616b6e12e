"""Sensor Parquet: one numeric column per channel; the schema's metadata may state ``rate_hz``."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, MissingExtraError, UnsupportedMediaError

_MOST_COLUMNS = 100_000


@dataclass(frozen=True, slots=True)
class ParquetLayout:
    """What the footer states: column names, rows, and the rate if its metadata holds one."""

    names: tuple[str, ...]
    num_rows: int
    rate_hz: float | None
    file: Any
    item: str

    def edge_times(self, column: str) -> tuple[float, float]:
        """The first and the last time in seconds; reads that one column alone.

        Raises:
            CorruptMediaError: if it cannot be read or holds a missing value there.
        """
        values = _columns(self.file, [column], self.item)[:, 0]
        return float(values[0]), float(values[-1])


def read_parquet_layout(data: bytes, name: str) -> ParquetLayout:
    """Read the footer of a Parquet file.

    Raises:
        CorruptMediaError: if it is damaged or names a column twice.
        UnsupportedMediaError: if a column does not hold numbers.
        MissingExtraError: if pyarrow is absent.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "data", "reading Parquet files") from None
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
        metadata = schema.metadata or {}
        names = tuple(schema.names)
        types = list(schema.types)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise CorruptMediaError(name, f"the Parquet footer cannot be read ({str(error)[:120]})") from None
    if len(set(names)) != len(names) or len(names) > _MOST_COLUMNS or num_rows < 0:
        raise CorruptMediaError(name, f"{num_rows} rows of columns {list(names[:20])}; expected distinct names")
    for column, kind in zip(names, types, strict=True):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise UnsupportedMediaError(name, f"column {column!r} holds {kind}; expected integers or floats")
    return ParquetLayout(names, num_rows, _stated_rate(metadata, name), file, name)


def read_parquet(data: bytes, name: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Column names and all rows, ``[rows, columns]`` float64; missing values are NaN.

    Raises:
        MediaError: as :func:`read_parquet_layout` does, or if a column is damaged.
    """
    layout = read_parquet_layout(data, name)
    return layout.names, _columns(layout.file, list(layout.names), name)


def _columns(file: Any, names: list[str], item: str) -> NDArray[np.float64]:
    import pyarrow as pa

    try:
        table = file.read(columns=names, use_threads=False)
        columns = [table.column(name).cast(pa.float64()).to_numpy() for name in names]
        if len({len(column) for column in columns}) != 1 or len(columns[0]) != file.metadata.num_rows:
            raise ValueError("its columns do not have the promised number of rows")
        return np.stack(columns, axis=1)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise CorruptMediaError(item, f"the Parquet data cannot be read ({str(error)[:120]})") from None


def _stated_rate(metadata: dict[bytes, bytes], item: str) -> float | None:
    if b"rate_hz" not in metadata:
        return None
    try:
        rate_hz = float(metadata[b"rate_hz"])
    except ValueError:
        rate_hz = math.nan
    if not math.isfinite(rate_hz):
        raise CorruptMediaError(item, f"the metadata states rate_hz {metadata[b'rate_hz']!r}; expected a number")
    return rate_hz
