"""What the benchmarks share: interleaved timing, medians with ranges, the table, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(slots=True)
class Options:
    """The command line of every benchmark."""

    threads: int
    quick: bool
    repeat: int
    out: Path
    device: str = "cpu"


@dataclass(slots=True)
class Timed:
    """What a case returns that takes its own time, so that its set-up does not count."""

    work: float
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def start(self) -> None:
        """Start the clocks."""
        self.wall_s, self.cpu_s = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Stop the clocks."""
        self.wall_s, self.cpu_s = time.perf_counter() - self.wall_s, time.process_time() - self.cpu_s


@dataclass(slots=True)
class Row:
    """One measured case: wall and processor seconds of each round, and what a round does."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    work: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """Work per second of each round."""
        return [self.work / seconds for seconds in self.seconds]


@dataclass(slots=True)
class Goal:
    """A goal and what was found; both are ratios or figures of one run."""

    what: str
    wanted: str
    found: float
    met: bool


@dataclass(slots=True)
class Result:
    """Everything that one script writes."""

    name: str
    title: str
    tables: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_rows(self, title: str, rows: Sequence[Row], unit: str, baseline: str) -> None:
        """Add a table of rates: median and range of each row, and its ratios to the baseline in the same round."""
        base = next(row for row in rows if row.name == baseline)
        columns = ["case", unit, "range", "ratio by CPU time", "range", "ratio by wall time", "range"]
        extras = list(dict.fromkeys(key for row in rows for key in row.extra))
        cells = []
        for row in rows:
            by_cpu, paired = cpu_ratios(row, base), ratios(row, base)
            cells.append(
                [row.name, _short(statistics.median(row.rates)), _range(row.rates)]
                + [
                    f"{statistics.median(by_cpu):.2f}",
                    _range(by_cpu),
                    f"{statistics.median(paired):.2f}",
                    _range(paired),
                ]
                + [str(row.extra.get(key, "")) for key in extras]
            )
        title = f"{title}; ratios to '{baseline}'"
        self.tables.append({"title": title, "columns": columns + extras, "rows": cells})

    def add_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table as it is."""
        cells = [[cell if isinstance(cell, str) else _short(cell) for cell in row] for row in rows]
        self.tables.append({"title": title, "columns": list(columns), "rows": cells})

    def add_goal(self, what: str, wanted: float, found: float, unit: str = "x") -> None:
        """Add a goal of the form 'at least'."""
        self.goals.append(Goal(what, f">= {wanted:g}{unit}", round(found, 3), found >= wanted))

    def finish(self, options: Options, hardware: Mapping[str, Any] | None = None) -> Path:
        """Print the tables and write the JSON file; returns its path."""
        print(self.text())
        data = {
            "name": self.name,
            "title": self.title,
            "date": date.today().isoformat(),
            "command": f"python -m benchmarks.{self.name} --threads {options.threads} --repeat {options.repeat}"
            + (" --quick" if options.quick else ""),
            "hardware": dict(hardware or machine()),
            "threads": options.threads,
            "rounds": options.repeat,
            "quick": options.quick,
            "goals": [
                {"what": goal.what, "wanted": goal.wanted, "found": goal.found, "met": goal.met} for goal in self.goals
            ],
            "tables": self.tables,
            "notes": self.notes,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{self.name}-{data['date']}.json"
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")
        return path

    def text(self) -> str:
        """The tables, goals and notes for a terminal."""
        lines = [f"== {self.title}"]
        for table in self.tables:
            lines += ["", table["title"], *_aligned([table["columns"], *table["rows"]])]
        if self.goals:
            lines.append("")
        for goal in self.goals:
            verdict = "met" if goal.met else "NOT MET"
            lines.append(f"goal: {goal.what}: wanted {goal.wanted}, found {goal.found} ({verdict})")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def parse_options(description: str | None, argv: Sequence[str] | None, repeat: int = 5) -> Options:
    """Read the command line, and set the number of threads."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a trial of the script")
    parser.add_argument("--repeat", type=int, default=None, help=f"rounds, at least 3; {repeat} by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--device", default="auto", help="cpu or cuda, where the benchmark runs on either")
    found = parser.parse_args(argv)
    rounds = found.repeat or (3 if found.quick else repeat)
    if rounds < 3:
        parser.error(f"--repeat: found {rounds}, expected at least 3: one round says nothing about its own noise")
    # Libraries read this when they are first imported, which no benchmark does before this point.
    os.environ["OMP_NUM_THREADS"] = str(found.threads)
    import torch

    torch.set_num_threads(found.threads)
    return Options(found.threads, found.quick, rounds, found.out, found.device)


def interleave(cases: Mapping[str, Callable[[], float | Timed]], rounds: int, *, warm: bool = True) -> list[Row]:
    """Time every case once per round, in an order that turns from round to round.

    Args:
        cases: name to a function that does a fixed amount of work and returns how much (tokens, steps, samples), or
            a :class:`Timed` if only a part of what it does counts.
        rounds: how often.
        warm: run every case once before, unmeasured.
    """
    rows = {name: Row(name) for name in cases}
    names = list(cases)
    if warm:
        for run in cases.values():
            run()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            whole = Timed(0.0)
            whole.start()
            done = cases[name]()
            whole.stop()
            taken = done if isinstance(done, Timed) else Timed(done, whole.wall_s, whole.cpu_s)
            rows[name].seconds.append(taken.wall_s)
            rows[name].cpu_seconds.append(taken.cpu_s)
            rows[name].work = taken.work
    return list(rows.values())


def ratios(row: Row, base: Row) -> list[float]:
    """The row's rate over the base's, round by round."""
    return [one / other for one, other in zip(row.rates, base.rates, strict=True)]


def cpu_ratios(row: Row, base: Row) -> list[float]:
    """The same by processor time of all threads: what other programs on the machine change least."""
    pairs = zip(row.cpu_seconds, base.cpu_seconds, strict=True)
    return [other / base.work * row.work / one for one, other in pairs]


def cpu_ratio(rows: Sequence[Row], name: str, baseline: str) -> float:
    """Median over rounds of one row's work per processor second over another's; what goals are judged by."""
    found = {row.name: row for row in rows}
    return statistics.median(cpu_ratios(found[name], found[baseline]))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    found = {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{_short(low)} - {_short(high)}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
