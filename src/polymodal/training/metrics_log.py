"""The numbers of a run as JSON Lines, and, where asked for, in TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymodal.core.errors import DataError, MissingExtraError

Value = float | int | str | bool | None


class MetricsLog:
    """Appends one JSON object per call, each with its ``step``, and flushes it.

    Numbers that are not finite are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which JSON can hold.

    Args:
        path: the file; made with its folder if absent.
        resume_step: the step of the checkpoint that the run goes on from (0 for a new run). Records after it, and
            a torn last line, are removed, so that no step stands there twice.
        tensorboard: a folder for TensorBoard's files, or None.

    Raises:
        MissingExtraError: if TensorBoard is asked for and not installed.
        DataError: if the file holds a line that is no record.
    """

    def __init__(self, path: Path, resume_step: int = 0, tensorboard: Path | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._board = _board(tensorboard, resume_step) if tensorboard is not None else None
        _truncate(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, step: int, values: Mapping[str, Value]) -> None:
        """Write one record; ``values`` may have any keys but ``step``."""
        record = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a log, oldest first; a torn last line is left out.

    Raises:
        DataError: if another line is no record; names it.
    """
    return [json.loads(line) for line in _sound_lines(Path(path))]


def _plain(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _sound_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    sound = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int) and line.endswith(b"\n"):
            sound.append(line)
        elif number < len(lines):
            raise DataError(
                f"{path}, line {number}: found {line[:60]!r}, expected a JSON object with 'step'; move the file away"
            )
    return sound


def _truncate(path: Path, resume_step: int) -> None:
    """Keep the records up to ``resume_step``; the file is replaced in one move, and only if it changes."""
    if not path.exists():
        return
    kept = b"".join(line for line in _sound_lines(path) if json.loads(line)["step"] <= resume_step)
    if len(kept) != path.stat().st_size:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(kept)
        os.replace(temporary, path)


def _board(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboard", "log", "writing TensorBoard logs") from None
    return SummaryWriter(str(folder), purge_step=resume_step + 1)
