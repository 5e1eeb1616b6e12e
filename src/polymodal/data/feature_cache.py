"""A cache on disk for the features of frozen encoders: what was encoded once is read from then on.

One folder per fingerprint (the reader, the encoder and its weights) with three files: ``about.json`` (format, storage
type), ``features.bin`` (arrays, one item after the other) and ``index.bin`` (one checksummed record per item, written
after the item's arrays). Both grow at their end only, so that a crash can damage no more than the last item.

Shape legend: ``U`` units of an item, ``N`` features of a unit, ``D`` width, ``P`` pooled width.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from numpy.typing import NDArray

from polymodal.core.errors import DataError
from polymodal.core.locks import lock
from polymodal.data.feature_arrays import Features, Storage, decode, encode

FORMAT = 1

_FRAME = struct.Struct("<II")
"""Start of an index record: length and CRC-32 of what follows."""
_RECORD = struct.Struct("<QQIIIII")
"""Offset and size in the data file, CRC-32 of the data, U, N, D, P (0: no pooled vectors); then the key in UTF-8."""
_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    size: int
    crc: int
    shape: tuple[int, int, int, int]


class FeatureCache:
    """Features of frozen encoders by content key.

    One process may write, any number may read; a reader sees what was complete when it opened or last called
    :meth:`refresh`. Nothing is ever removed: what the cache holds it keeps. Safe to use from several threads.

    Args:
        root: the folder of all caches.
        fingerprint: names what made the features (reader, encoder, weights); the name of the cache's folder.
        storage: how floats are stored; reading always gives float32. ``float16`` halves the size and keeps 11 bits,
            up to 65,504; ``bfloat16`` keeps 8 bits and the whole range.
        max_bytes: the most bytes of the data file; when the next item would pass it, :meth:`put` stores nothing.
        writable: open for writing; takes the folder's lock until :meth:`close`.

    Raises:
        DataError: if the folder is missing (reading), is of another format or storage type, or has a writer already.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        fingerprint: str,
        *,
        storage: Storage = "float16",
        max_bytes: int | None = None,
        writable: bool = True,
    ) -> None:
        if not fingerprint or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in fingerprint):
            raise DataError(f"fingerprint: found {fingerprint!r}, expected letters, digits, '-', '_' and '.' only")
        if fingerprint[0] == ".":
            raise DataError(f"fingerprint: found {fingerprint!r}, expected a name that does not start with a dot")
        self.folder = Path(root) / fingerprint
        self.storage = storage
        self.max_bytes = max_bytes
        self.writable = writable
        self._places: dict[str, _Place] = {}
        self._checked: set[str] = set()
        self._guard = threading.RLock()
        self._index_end = self._data_end = 0
        self._map: mmap.mmap | None = None
        self._lock: BinaryIO | None = None
        if writable:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / "lock")
        try:
            self._check_about()
            mode = "r+b" if writable else "rb"
            self._index = self._path("index.bin").open(mode, buffering=0)
            self._data = self._path("features.bin").open(mode, buffering=0)
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise
        self.refresh()
        if writable:
            self._index.truncate(self._index_end)
            self._data.truncate(self._data_end)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data file."""
        return self._data_end

    def get(self, key: str) -> Features | None:
        """The features of a key; None if it is not there.

        With ``float32`` storage the arrays are read-only views of the mapped file. The checksum of an item is verified
        when it is first read; an item that fails is forgotten, and can be put again.
        """
        with self._guard:
            place = self._places.get(key)
            if place is None:
                return None
            view = self._view(place)
            if key not in self._checked:
                if zlib.crc32(view) != place.crc:
                    del self._places[key]
                    return None
                self._checked.add(key)
        return decode(view, place.shape, self.storage)

    def put(
        self,
        key: str,
        x_UND: NDArray[Any],
        is_valid_UN: NDArray[Any],
        pooled_UP: NDArray[Any] | None = None,
    ) -> bool:
        """Store the features of a key.

        Args:
            key: the content key.
            x_UND: float features ``[U, N, D]``, at least one of each.
            is_valid_UN: bool ``[U, N]``.
            pooled_UP: float ``[U, P]``, or None.

        Returns:
            True if the key is stored now, False if it did not fit ``max_bytes``.

        Raises:
            DataError: if shapes do not agree, a valid value is not finite or too large for ``float16``, or the cache
                is open for reading only.
        """
        if not self.writable:
            raise DataError(f"{self.folder}: the cache is open for reading only; open it with writable=True")
        with self._guard:
            if key in self._places:
                return True
            data, shape = encode(key, x_UND, is_valid_UN, pooled_UP, self.storage)
            offset = -(-self._data_end // _ALIGN_BYTES) * _ALIGN_BYTES
            if self.max_bytes is not None and offset + len(data) > self.max_bytes:
                return False
            place = _Place(offset, len(data), zlib.crc32(data), shape)
            body = _RECORD.pack(place.offset, place.size, place.crc, *shape) + key.encode()
            _write_at(self._data, offset, data)
            _write_at(self._index, self._index_end, _FRAME.pack(len(body), zlib.crc32(body)) + body)
            self._data_end = offset + len(data)
            self._index_end += _FRAME.size + len(body)
            self._places[key] = place
            self._checked.add(key)
            return True

    def refresh(self) -> None:
        """Take in what a writer has added since opening; stops at the first record that is not whole."""
        with self._guard:
            self._index.seek(self._index_end)
            log = self._index.read()
            data_bytes = os.fstat(self._data.fileno()).st_size
            start = 0
            while (record := _read_record(log, start)) is not None:
                key, place, end = record
                if place.offset + place.size > data_bytes:
                    break
                self._places[key] = place
                self._data_end = max(self._data_end, place.offset + place.size)
                self._index_end += end - start
                start = end

    def flush(self) -> None:
        """Wait until everything put so far is on the disk, safe from a power cut."""
        if self.writable:
            os.fsync(self._data.fileno())
            os.fsync(self._index.fileno())

    def close(self) -> None:
        """Flush, and release the files and the lock; arrays that were handed out stay valid."""
        if self._data.closed:
            return
        self.flush()
        self._map = None
        self._data.close()
        self._index.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if self.writable:
            path.touch()
        return path

    def _check_about(self) -> None:
        path = self.folder / "about.json"
        expected = {"format": FORMAT, "storage": self.storage}
        if not path.exists():
            if not self.writable:
                raise DataError(f"{self.folder}: there is no feature cache; open it with writable=True to make one")
            draft = path.with_suffix(".new")
            draft.write_text(json.dumps(expected), encoding="utf-8")
            draft.replace(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = "something that is not JSON"
        if found != expected:
            raise DataError(f"{path}: found {found}, expected {expected}; ask for what is stored, or delete the folder")

    def _view(self, place: _Place) -> memoryview:
        end = place.offset + place.size
        if self._map is None or len(self._map) < end:
            self._map = mmap.mmap(self._data.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._map)[place.offset : end]


def _read_record(log: bytes, start: int) -> tuple[str, _Place, int] | None:
    """The record at ``start`` and where it ends; None if it is torn or damaged."""
    if start + _FRAME.size > len(log):
        return None
    length, crc = _FRAME.unpack_from(log, start)
    body = log[start + _FRAME.size : start + _FRAME.size + length]
    if len(body) < length or length < _RECORD.size or zlib.crc32(body) != crc:
        return None
    offset, size, data_crc, *shape = _RECORD.unpack_from(body)
    units, num, width, pooled = shape
    key = body[_RECORD.size :].decode()
    return key, _Place(offset, size, data_crc, (units, num, width, pooled)), start + _FRAME.size + length


def _write_at(file: Any, offset: int, data: bytes) -> None:
    """Write all of ``data``; what a failed attempt left behind is overwritten by the next."""
    file.seek(offset)
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _locked(path: Path) -> BinaryIO:
    """The opened file of the writer's lock, which it holds until it is closed."""
    file = path.open("ab")
    try:
        lock(file)
    except OSError:
        file.close()
        raise DataError(
            f"{path.parent}: another process is writing this feature cache; wait for it, or open with writable=False"
        ) from None
    return file
