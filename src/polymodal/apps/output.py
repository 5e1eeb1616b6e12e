"""How commands print: a table for people, one JSON object for machines, progress on the side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_PIPED_WIDTH = 240
_QUIET_S = 2.0
_LINE_EVERY_S = 10.0


def console() -> Console:
    """The console that people read; into a file or a pipe, lines stay whole instead of folding at 80 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)


def say(line: str) -> None:
    """One line for people, as it stands: brackets in it are no markup, and it is never wrapped."""
    console().print(escape(line), soft_wrap=True)


def emit_json(data: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def emit_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; columns of numbers stand on the right."""
    cells = [[escape(str(cell)) for cell in row] for row in rows]
    # Rich would wrap a title to the width of its table.
    console().print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(columns):
        is_number = bool(cells) and all(_is_number(row[index]) for row in cells)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console().print(table)


def _is_number(cell: str) -> bool:
    return not cell or cell.translate(str.maketrans("", "", ".,%-+x")).isdigit()


def key_values(options: Iterable[str]) -> dict[str, Any]:
    """``key=value`` arguments; values are read as YAML.

    Raises:
        ConfigError: if one has no ``=``.
    """
    from polymodal.core.config import apply_overrides

    return apply_overrides({}, options)


class Bar:
    """Progress of a step that may be long: a bar on a terminal, now and then a line elsewhere, nothing if it is quick.

    Call it as ``bar(what, done, total)``; a new ``what`` begins a new bar. Use it in a ``with`` block.

    Args:
        stream: where it is written; standard error by default.
        is_silent: write nothing (``--json``).
        clock: seconds that only grow.
    """

    def __init__(
        self, stream: TextIO | None = None, *, is_silent: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._is_silent = is_silent
        self._clock = clock
        self._what = ""
        self._since_s = self._last_s = clock()
        self._bars: Progress | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say how far ``what`` is."""
        if self._is_silent:
            return
        if what != self._what:
            self._stop()
            self._what, self._since_s = what, self._clock()
            self._last_s = self._since_s
        now_s = self._clock()
        if self._stream.isatty():
            self._draw(now_s, done, total)
        elif now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
            self._stream.write(f"{what} {done:,}/{total:,}\n")
            self._stream.flush()

    def _draw(self, now_s: float, done: int, total: int) -> None:
        if self._bars is None:
            if now_s - self._since_s < _QUIET_S:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._bars.add_task(escape(self._what), total=total)
            self._bars.start()
        self._bars.update(self._bars.task_ids[0], completed=done, total=total)

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
