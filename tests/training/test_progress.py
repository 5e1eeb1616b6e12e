"""Progress: lines, the live table, silence, and the speeds it shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from polymodal.training.progress import (
    LineProgress,
    LiveProgress,
    Meter,
    Progress,
    Rates,
    Update,
    make_progress,
    memory_bytes,
    speed_cells,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def update(step: int) -> Update:
    return Update(step, {"next_token": 1.5, "next_token/image": 1.25}, 1e-3, num_tokens=100, num_samples=4)


def run(progress: Progress, clock: Clock, steps: range) -> None:
    progress.start("align", steps.stop - 1, done=steps.start - 1)
    for step in steps:
        clock.now_s += 0.5
        progress.update(update(step))
    progress.stop()


def test_the_meter_averages_over_its_window():
    clock = Clock()
    meter = Meter(20, clock, window=2)
    assert meter.add(update(1)) is None
    for step, seconds in ((2, 9.0), (3, 1.0), (4, 1.0)):
        clock.now_s += seconds
        rates = meter.add(update(step))
    assert (rates.tokens_per_s, rates.samples_per_s, rates.left_s) == (100.0, 4.0, 16.0)


def test_lines_at_the_first_and_last_update_and_by_time():
    stream, clock = io.StringIO(), Clock()
    run(LineProgress(stream, 2.0, clock), clock, range(1, 11))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "align: 10 updates"
    assert [line.split("  ")[0] for line in lines[1:]] == ["align 1/10", "align 5/10", "align 9/10", "align 10/10"]
    for cell in ("next_token 1.5000", "next_token/image 1.2500", "lr 1.00e-03", "200 tokens/s", "8.0 samples/s", "MiB"):
        assert cell in lines[2]
    assert lines[2].endswith("0:00:02 left") and lines[-1].endswith("0:00:00 left")


def test_a_stage_of_view_sets_tells_no_tokens():
    cells = speed_cells(Rates(tokens_per_s=0.0, samples_per_s=8.0, left_s=1.0))
    assert cells[0] == "8.0 samples/s" and not any("tokens" in cell for cell in cells)


def test_a_resumed_stage_says_so():
    stream, clock = io.StringIO(), Clock()
    run(LineProgress(stream, 2.0, clock), clock, range(4, 6))
    assert stream.getvalue().startswith("align: 5 updates, 3 of them done\n")


def test_the_live_table_shows_losses_speed_memory_and_time():
    stream, clock = io.StringIO(), Clock()
    progress = LiveProgress(Console(file=stream, force_terminal=True, width=160, color_system=None), clock)
    run(progress, clock, range(1, 4))
    progress.update(update(3))
    progress.note("sample 7 skipped")
    text = stream.getvalue()
    cells = ("align 3/3", "next_token", "image", "1.2500", "200 tokens/s", "8.0 samples/s", "MiB", "0:00:00 left")
    for cell in (*cells, "sample 7 skipped"):
        assert cell in text


def test_silence_and_the_choice():
    assert type(make_progress("silent")) is Progress
    run(make_progress("silent"), Clock(), range(1, 3))
    Progress().note("nothing")
    assert isinstance(make_progress("auto", io.StringIO()), LineProgress)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    assert isinstance(make_progress("auto", terminal), LiveProgress)


def test_memory():
    if "RSS" not in memory_bytes():
        pytest.skip("this system has no /proc")
    assert memory_bytes()["RSS"] > 2**20


def test_work_that_is_no_training_has_units_and_no_rate_of_learning():
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.start("align: encoding", 2, unit="samples")
    progress.update(Update(2, {}, None, 0, 1))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "align: encoding: 2 samples"
    assert lines[1].startswith("align: encoding 2/2") and "lr" not in lines[1]
