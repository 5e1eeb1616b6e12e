"""The predictions file while it is written: what an interrupted evaluation had stored is not asked again.

Records are written batch by batch into a file beside the final one, which takes its place when all are there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from polymodal.core.samples import Sample

Record = dict[str, Any]


class Predictions:
    """The records of one task on one model, by condition and sample id; use it in a ``with`` block.

    A file of an interrupted evaluation is continued if its header is the same; any other is begun anew.

    Args:
        path: the final file; None stores nothing.
        header: its first line; what tells this task, its data and this model from others.
        resumes: whether the header tells models apart, so that records of an interrupted evaluation can be kept.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, resumes: bool = False) -> None:
        self._path = path
        self._header = json.dumps(header) + "\n"
        self._known: dict[tuple[str, str], Record] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        self._part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._read() if resumes else 0
        self._file = self._part.open("a" if kept else "w", encoding="utf-8")
        if kept:
            # A line that was cut off is asked again.
            self._file.truncate(kept)
        else:
            self._file.write(self._header)

    def __enter__(self) -> Predictions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None and self._path is not None:
            self._file.close()
            if kind is None:
                os.replace(self._part, self._path)

    def of(self, condition: str, samples: Sequence[Sample]) -> list[Record] | None:
        """The stored records of all these samples; None unless every one is there."""
        found = [self._known.get((condition, sample.id)) for sample in samples]
        records = [record for record in found if record is not None]
        return records if len(records) == len(found) else None

    def keep(self, records: Iterable[Record]) -> Iterator[Record]:
        """Pass the records on, as they are stored; those that are not stored yet are written."""
        for record in records:
            key = record["condition"], record["id"]
            if key not in self._known and self._file is not None:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            yield self._known.get(key, record)

    def _read(self) -> int:
        """Read the records of an interrupted evaluation; the bytes of them and the header, 0 if there are none."""
        lines = []
        with contextlib.suppress(OSError):
            lines = self._part.read_bytes().splitlines(keepends=True)
        if not lines or lines[0] != self._header.encode():
            return 0
        kept = len(lines[0])
        for line in lines[1:]:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self._known[record["condition"], record["id"]] = record
            kept += len(line)
        return kept
