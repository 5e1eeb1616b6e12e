"""What a person sees while a run goes: a live table on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer update, as the loop reports it.

    Args:
        step: updates done in this stage, this one included.
        losses: ``objective`` and ``objective/modality`` to value.
        lr: the learning rate of the first group; None for work that is no training.
        num_tokens: tokens that went through the model; num_samples: samples.
    """

    step: int
    losses: Mapping[str, float]
    lr: float | None
    num_tokens: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Speed over the recent updates; None before two of them were seen."""

    tokens_per_s: float
    samples_per_s: float
    left_s: float


class Meter:
    """Measures speed over a sliding window of updates.

    Args:
        total: updates of the stage.
        clock: seconds that only grow.
        window: updates that are averaged over.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic, window: int = 50) -> None:
        self.total = total
        self._clock = clock
        self._seen: deque[tuple[float, Update]] = deque(maxlen=window + 1)

    def add(self, update: Update) -> Rates | None:
        """Take note of an update and give the rates with it."""
        self._seen.append((self._clock(), update))
        seconds = self._seen[-1][0] - self._seen[0][0]
        recent = [one for _, one in list(self._seen)[1:]]
        if not recent or seconds <= 0:
            return None
        return Rates(
            sum(one.num_tokens for one in recent) / seconds,
            sum(one.num_samples for one in recent) / seconds,
            max(0, self.total - update.step) * seconds / len(recent),
        )


def memory_bytes() -> dict[str, int]:
    """Memory of this process: ``RSS``, and ``CUDA`` (allocated by torch, at its peak) where a GPU is in use."""
    result = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        result["RSS"] = int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        result["CUDA"] = torch.cuda.max_memory_allocated()
    return result


class Progress:
    """Shows nothing; the base of those that do."""

    def start(self, stage: str, total: int, done: int = 0, unit: str = "updates") -> None:
        """A stage begins: its name, its updates (or other units), and how many a resumed run has done."""

    def update(self, update: Update) -> None:
        """An update was made."""

    def note(self, text: str) -> None:
        """Say something that is not a number, such as a skipped sample."""

    def stop(self) -> None:
        """The stage ended, or failed."""


class LineProgress(Progress):
    """One plain line at the first and last update and every ``every_s`` seconds between."""

    def __init__(self, stream: TextIO, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._stage, self._meter, self._last_s = "", Meter(0, clock), float("-inf")

    def start(self, stage: str, total: int, done: int = 0, unit: str = "updates") -> None:
        """See :meth:`Progress.start`."""
        self._stage, self._meter, self._last_s = stage, Meter(total, self._clock), float("-inf")
        self.note(f"{stage}: {total:,} {unit}" + (f", {done:,} of them done" if done else ""))

    def update(self, update: Update) -> None:
        """See :meth:`Progress.update`."""
        rates = self._meter.add(update)
        now_s = self._clock()
        if now_s - self._last_s >= self._every_s or update.step == self._meter.total:
            self._last_s = now_s
            cells = [f"{self._stage} {update.step:,}/{self._meter.total:,}", *loss_cells(update), *speed_cells(rates)]
            self.note("  ".join(cells))

    def note(self, text: str) -> None:
        """See :meth:`Progress.note`."""
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveProgress(Progress):
    """A table that is redrawn in place: bar, losses, speed, memory and time left."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._stage, self._meter = "", Meter(0, clock)
        self._live: Live | None = None

    def start(self, stage: str, total: int, done: int = 0, unit: str = "updates") -> None:
        """See :meth:`Progress.start`."""
        self.stop()
        self._stage, self._meter = stage, Meter(total, self._clock)
        self._live = Live(Text(f"{stage} {done:,}/{total:,}"), console=self._console, refresh_per_second=4)
        self._live.start()

    def update(self, update: Update) -> None:
        """See :meth:`Progress.update`."""
        rates = self._meter.add(update)
        if self._live is None:
            return
        table = Table.grid(padding=(0, 2))
        done = f"{self._stage} {update.step:,}/{self._meter.total:,}"
        table.add_row(Text(done, style="bold"), ProgressBar(self._meter.total, update.step, width=40))
        for name, value in update.losses.items():
            depth, _, part = name.rpartition("/")
            table.add_row(Text(f"  {part}" if depth else name), f"{value:.4f}")
        self._live.update(Group(table, Text("  ".join([*_lr(update), *speed_cells(rates)]), style="dim")))

    def note(self, text: str) -> None:
        """See :meth:`Progress.note`."""
        self._console.print(Text(text))

    def stop(self) -> None:
        """See :meth:`Progress.stop`."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def loss_cells(update: Update) -> list[str]:
    """The losses and the learning rate, as short texts."""
    return [*(f"{name} {value:.4f}" for name, value in update.losses.items()), *_lr(update)]


def _lr(update: Update) -> list[str]:
    return [] if update.lr is None else [f"lr {update.lr:.2e}"]


def speed_cells(rates: Rates | None) -> list[str]:
    """Speed, memory and time left, as short texts."""
    cells = []
    if rates is not None:
        # View sets are counted in samples; a stage of them has no tokens to tell.
        cells += [f"{rates.tokens_per_s:,.0f} tokens/s"] if rates.tokens_per_s else []
        cells.append(f"{rates.samples_per_s:,.1f} samples/s")
    cells += [f"{name} {size / 2**20:,.0f} MiB" for name, size in memory_bytes().items()]
    if rates is not None:
        minutes, seconds = divmod(round(rates.left_s), 60)
        cells.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return cells


def make_progress(mode: Literal["auto", "silent"] = "auto", stream: TextIO | None = None) -> Progress:
    """Live on a terminal, lines elsewhere, nothing for ``silent`` (``--json``); on standard error by default."""
    if mode == "silent":
        return Progress()
    stream = stream or sys.stderr
    if stream.isatty():
        return LiveProgress(Console(file=stream))
    return LineProgress(stream)
