"""Sources: samples that lie in JSON Lines files, read by index without loading the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import DataError, SampleError
from polymodal.core.parts import Media, Part
from polymodal.core.samples import Message, Sample, sample_from_json, sample_to_json

FOLDER_FILE = "data.jsonl"
"""The file that a data folder is opened by."""
_CHUNK_BYTES = 1 << 24
_EDGE_BYTES = 1 << 20
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_NEWLINE = 10


class JsonlSource:
    """Samples of a JSON Lines file by index; blank lines do not count.

    Memory is 16 bytes a sample (24 where the file has blank lines); each access reads its own line, so that threads and
    worker processes may share a source.

    Args:
        path: the file; relative media paths start from its folder.

    Raises:
        DataError: if the file is missing, compressed, or holds no samples.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() in _COMPRESSED:
            raise DataError(f"{self.path}: compressed files cannot be read by index; decompress it to .jsonl first")
        try:
            self.fingerprint = _fingerprint(self.path)
            self._starts, self._stops, self._lines = _index(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if len(self._starts) == 0:
            raise DataError(f"{self.path}: holds no samples; expected one JSON object a line")

    @property
    def name(self) -> str:
        """What records call this source."""
        return str(self.path)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:
        """One sample; a negative index counts from the end.

        Raises:
            IndexError: if there is no such sample.
            SampleError: if the line is malformed; names the line.
        """
        name = self.default_id(index)
        return sample_from_json(self.record(index), self.path.parent, name)

    def line_number(self, index: int) -> int:
        """The line of a sample in the file, from 1.

        Raises:
            IndexError: if there is no such sample.
        """
        index = self._place(index)
        return index + 1 if self._lines is None else int(self._lines[index])

    def default_id(self, index: int) -> str:
        """What a sample without an id is called: ``file.jsonl:line``."""
        return f"{self.path.name}:{self.line_number(index)}"

    def record(self, index: int) -> Any:
        """The parsed JSON of one line.

        Raises:
            IndexError: if there is no such sample.
            SampleError: if the line is not JSON.
        """
        place = self._place(index)
        name = self.default_id(place)
        start, stop = int(self._starts[place]), int(self._stops[place])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return json.loads(file.read(stop - start))
        except OSError as error:
            raise SampleError(name, f"the file cannot be read any more: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise SampleError(name, f"is not valid JSON ({str(error)[:120]}); expected one object a line") from None

    def _place(self, index: int) -> int:
        size = len(self._starts)
        if not -size <= index < size:
            raise IndexError(f"{self.path}: sample {index} of {size}")
        return index % size


def open_source(path: str | os.PathLike[str]) -> JsonlSource:
    """The source of a file, or of a folder that holds ``data.jsonl``.

    Raises:
        DataError: if there is none; lists what the folder holds instead.
    """
    path = Path(path)
    if not path.is_dir():
        return JsonlSource(path)
    if (path / FOLDER_FILE).is_file():
        return JsonlSource(path / FOLDER_FILE)
    found = sorted(str(file.relative_to(path)) for file in path.glob("*.jsonl"))
    hint = f"name one of: {', '.join(found[:10])}" if found else "it holds no .jsonl file; import the data first"
    raise DataError(f"{path}: a folder without {FOLDER_FILE}; {hint}")


def write_jsonl(path: str | os.PathLike[str], samples: Iterable[Sample]) -> int:
    """Write samples, and return how many; the file appears whole or not at all.

    Media below the file's folder are written with relative paths, others with absolute ones.

    Raises:
        SampleError: if a media part is in memory.
        DataError: if ``path`` is a folder.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise DataError(f"{path}: is a folder, expected a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    count = 0
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for sample in samples:
                data = sample_to_json(_with_absolute_paths(sample), path.parent)
                file.write(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def duplicate_ids(source: JsonlSource) -> dict[str, list[int]]:
    """Ids that several samples share, each with the indices of its samples; lines that are not objects are left out.

    Ids are compared by 64-bit hashes first, so that memory stays at 8 bytes a sample.
    """
    hashes = np.zeros(len(source), np.uint64)
    for index in range(len(source)):
        digest = hashlib.blake2b(_id_of(source, index).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        hashes[index] = int.from_bytes(digest, "little")
    order = np.argsort(hashes, kind="stable")
    is_same = hashes[order][1:] == hashes[order][:-1]
    suspects = np.unique(np.concatenate([order[1:][is_same], order[:-1][is_same]]))
    groups: dict[str, list[int]] = {}
    for index in suspects.tolist():
        groups.setdefault(_id_of(source, index), []).append(index)
    return {id: indices for id, indices in groups.items() if len(indices) > 1}


def _id_of(source: JsonlSource, index: int) -> str:
    default = source.default_id(index)
    try:
        record = source.record(index)
    except SampleError:
        return default
    return str(record.get("id", default)) if isinstance(record, dict) else default


def _index(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
    """Start and stop of every non-blank line, and their line numbers where blank lines make them differ."""
    size = path.stat().st_size
    if size == 0:
        empty = np.zeros(0, np.int64)
        return empty, empty, None
    data = np.memmap(path, np.uint8, "r")
    ends: list[NDArray[np.int64]] = []
    for offset in range(0, size, _CHUNK_BYTES):
        ends.append(np.flatnonzero(data[offset : offset + _CHUNK_BYTES] == _NEWLINE).astype(np.int64) + offset)
    if data[-1] != _NEWLINE:
        ends.append(np.array([size], np.int64))
    stops = np.concatenate(ends)
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
    # A line that starts with a brace is not blank; only the others are looked at one by one.
    is_blank = starts == stops
    for line in np.flatnonzero(~is_blank & (data[np.minimum(starts, size - 1)] <= ord(" "))).tolist():
        is_blank[line] = not data[starts[line] : stops[line]].tobytes().strip()
    if not is_blank.any():
        return starts, stops, None
    kept = np.flatnonzero(~is_blank).astype(np.int64)
    return starts[kept], stops[kept], kept + 1


def _fingerprint(path: Path) -> str:
    """Hex digest of size, time of change, and the first and last MiB: equal files of any size in constant time."""
    status = path.stat()
    digest = hashlib.blake2b(f"{status.st_size} {status.st_mtime_ns}".encode(), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, status.st_size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def _with_absolute_paths(sample: Sample) -> Sample:
    messages = tuple(Message(message.role, _absolute(message.parts)) for message in sample.messages)
    views = dict(zip(sample.views, _absolute(tuple(sample.views.values())), strict=True))
    return replace(sample, messages=messages, views=views)


def _absolute(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(
        replace(part, source=Path(os.path.abspath(part.path)))
        if isinstance(part, Media) and part.path is not None
        else part
        for part in parts
    )
