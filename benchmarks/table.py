"""Writes the measured tables into ``docs/benchmarks.md`` from the JSON files, so that no figure is typed by hand.

Usage: ``python -m benchmarks.table`` (write) or ``python -m benchmarks.table --check`` (exit 1 if the page is stale).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
ORDER = ("packing", "feature_cache", "trainer", "mfu", "loader", "start", "checkpoint", "generation", "dropping")


def newest(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Per benchmark the figures of its last date; files of ``--quick`` runs are passed over."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*-????-??-??.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        held = found.get(data["name"])
        if not data["quick"] and (held is None or data["date"] >= held["date"]):
            found[data["name"]] = data
    return found


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The goals of all benchmarks in one table, then each benchmark's own tables."""
    names = [name for name in ORDER if name in results] + sorted(set(results) - set(ORDER))
    goals = [[name, goal] for name in names for goal in results[name]["goals"]]
    rows = [
        [name, goal["what"], goal["wanted"], f"{goal['found']:g}", "yes" if goal["met"] else "no"]
        for name, goal in goals
    ]
    lines = ["### Goals", "", *_table(["benchmark", "goal", "wanted", "found", "met"], rows), ""]
    for name in names:
        lines += _section(results[name])
    missing = [name for name in ORDER if name not in results]
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _verdict(goal: dict[str, Any]) -> list[str]:
    return [goal["what"], goal["wanted"], f"{goal['found']:g}", "yes" if goal["met"] else "no"]


def _section(data: dict[str, Any]) -> list[str]:
    hardware = ", ".join(f"{key} {value}" for key, value in data["hardware"].items())
    lines = [
        f"### {data['title']}",
        "",
        f"`{data['command']}`, {data['date']}, {data['threads']} thread(s), {data['rounds']} rounds; {hardware}.",
        "",
    ]
    for table in data["tables"]:
        lines += [f"**{table['title']}**", "", *_table(table["columns"], table["rows"]), ""]
    return lines + [f"- {note}" for note in data["notes"]] + ([""] if data["notes"] else [])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def written(page: str, measured: str) -> str:
    """The page with what stands between the marks replaced.

    Raises:
        ValueError: if the page lacks the marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"found no '{BEGIN}' ... '{END}' in the page, expected both marks on lines of their own")
    return f"{head}{begin}\n\n{measured}\n{end}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is stale")
    check = parser.parse_args(argv).check
    page = PAGE.read_text(encoding="utf-8")
    fresh = written(page, markdown(newest()))
    if check and fresh != page:
        print(f"{PAGE}: is stale; run: python -m benchmarks.table", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")
        print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
