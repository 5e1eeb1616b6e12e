"""What every importer shares: the report, the file it writes, and the check that media are there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.core.errors import DataError
from polymodal.core.samples import Sample
from polymodal.data.sources import write_jsonl

PathLike = str | os.PathLike[str]


@dataclass(slots=True)
class ImportReport:
    """What an import did.

    Args:
        written: samples in the output.
        skipped: ``(name, reason)`` of everything that was found and not written.
        renamed: samples whose id was taken already and got a ``#2``, ``#3``, ...
    """

    written: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    renamed: int = 0
    _ids: dict[str, int] = field(default_factory=dict, repr=False)

    def skip(self, name: str, reason: str) -> None:
        """Note that something was not written, and why."""
        self.skipped.append((name, reason))

    def unique_id(self, id: str) -> str:
        """``id``, or ``id#2`` and so on if it was given before."""
        if id not in self._ids:
            self._ids[id] = 1
            return id
        self.renamed += 1
        while (name := f"{id}#{self._ids[id] + 1}") in self._ids:
            self._ids[id] += 1
        self._ids[id] += 1
        self._ids[name] = 1
        return name

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"written": self.written, "renamed": self.renamed, "skipped": [list(item) for item in self.skipped]}


def finish(report: ImportReport, src: PathLike, out: PathLike, samples: Iterator[Sample]) -> ImportReport:
    """Write ``samples``, which fill ``report`` as they are drawn.

    Raises:
        DataError: if nothing could be imported (gives the first reasons), or ``out`` is ``src``; nothing is written
    """
    if Path(out).exists() and os.path.samefile(src, out):
        raise DataError(f"{out}: is what is imported, expected another file to write")
    first = next(samples, None)
    if first is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.skipped[:3]) or "it holds nothing"
        raise DataError(f"nothing was imported, {len(report.skipped)} items were skipped ({reasons})")

    def rest() -> Iterator[Sample]:
        yield first
        yield from samples

    report.written = write_jsonl(out, rest())
    return report


def media_file(root: Path, name: str) -> Path:
    """The file that an annotation names; where there is none of that name, backslashes separate folders (Windows)."""
    if "\\" in name and not os.path.exists(root / name):
        return root / name.replace("\\", "/")
    return root / name


def problem_with(path: Path) -> str | None:
    """Why a media file cannot be used, as far as the file system knows; None if it can."""
    try:
        if not path.is_file():
            return f"the file {path} is missing"
        return "the file is empty (0 bytes)" if path.stat().st_size == 0 else None
    except (OSError, ValueError) as error:
        return f"the file {str(path)[:200]!r} cannot be read: {error}"


def image_folder(src: Path, images: PathLike | None) -> Path:
    """Where relative image names start: ``images``, else the folder ``images`` beside ``src``, else its own folder.

    Raises:
        DataError: if a stated folder does not exist.
    """
    if images is None:
        beside = src.parent / "images"
        return beside if beside.is_dir() else src.parent
    if not Path(images).is_dir():
        raise DataError(f"images: there is no folder {images}")
    return Path(images)
