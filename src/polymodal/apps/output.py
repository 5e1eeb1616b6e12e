"""How commands print: a table for people, one JSON object for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """The console that people read."""
    return Console(highlight=False)


def emit_json(data: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, default=str) + "\n")


def emit_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; numbers stand on the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        is_number = bool(rows) and all(_is_number(row[index]) for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _is_number(cell: str) -> bool:
    return cell.replace(".", "").replace(",", "").replace("%", "").replace("-", "").replace("x", "").isdigit() or not cell


def key_values(options: Iterable[str]) -> dict[str, Any]:
    """``key=value`` arguments; values are read as YAML.

    Raises:
        ConfigError: if one has no ``=``.
    """
    from polymodal.core.config import apply_overrides

    return apply_overrides({}, options)
