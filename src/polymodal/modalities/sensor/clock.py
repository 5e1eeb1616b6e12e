"""The rate of a recording: from its time column, its header or its part, and the proof that they agree."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, UnsupportedMediaError

TIME_COLUMNS = ("time", "timestamp", "t")
"""Column names, in any case, that hold seconds."""
STEP_TOLERANCE = 0.1
"""How far a step between two rows may be from the mean step, as a share of it."""
RATE_TOLERANCE = 0.01
"""How far a stated rate may be from the one that the time column shows, as a share of it."""
_FASTEST_HZ = 1e9
_SLOWEST_HZ = 1e-9


def time_column(names: tuple[str, ...]) -> int | None:
    """The index of the time column, or None."""
    return next((i for i, name in enumerate(names) if name.lower() in TIME_COLUMNS), None)


def rate_of_times(first_s: float, last_s: float, num_rows: int, name: str) -> float:
    """The mean rate in Hz of ``num_rows`` rows between two times in seconds.

    Raises:
        CorruptMediaError: if the times do not grow, or there are fewer than two rows.
    """
    if num_rows < 2:
        raise CorruptMediaError(name, f"{num_rows} row with a time column; a rate needs at least two rows")
    seconds = last_s - first_s
    if not math.isfinite(seconds) or seconds <= 0:
        raise CorruptMediaError(
            name, f"the time column goes from {first_s} s to {last_s} s; expected seconds that grow from row to row"
        )  # fmt: skip
    return checked_rate((num_rows - 1) / seconds, name)


def checked_rate(rate_hz: float, name: str) -> float:
    """``rate_hz`` if it is a usable rate.

    Raises:
        CorruptMediaError: if it is not finite, not positive, or absurd.
    """
    if not math.isfinite(rate_hz) or not _SLOWEST_HZ <= rate_hz <= _FASTEST_HZ:
        raise CorruptMediaError(name, f"a rate of {rate_hz} Hz; expected {_SLOWEST_HZ:g} to {_FASTEST_HZ:g} Hz")
    return float(rate_hz)


def settle_rate(shown_hz: float | None, stated_hz: float | None, name: str) -> float:
    """The rate, from what the time column shows and what the part or the file's header states.

    Raises:
        UnsupportedMediaError: if nothing tells the rate.
        CorruptMediaError: if the two disagree by more than ``RATE_TOLERANCE``.
    """
    if stated_hz is not None:
        stated_hz = checked_rate(stated_hz, name)
    if shown_hz is None and stated_hz is None:
        raise UnsupportedMediaError(
            name, f"no rate: it has no time column ({', '.join(TIME_COLUMNS)}, in seconds) and none is stated; "
            "give rate_hz with the part"
        )  # fmt: skip
    if shown_hz is None or stated_hz is None:
        return shown_hz if stated_hz is None else stated_hz  # type: ignore[return-value]
    if abs(shown_hz - stated_hz) > RATE_TOLERANCE * stated_hz:
        raise CorruptMediaError(
            name, f"the time column shows {shown_hz:.6g} Hz, but {stated_hz:.6g} Hz is stated; they may differ by "
            f"{RATE_TOLERANCE:.0%}. Correct rate_hz or leave it out"
        )  # fmt: skip
    return shown_hz


def check_times(times_s: NDArray[np.float64], name: str) -> None:
    """Prove that rows follow each other at one rate.

    Raises:
        CorruptMediaError: at the first time that is not finite, repeats, goes back, or leaves the rate by more than
            ``STEP_TOLERANCE``; says which row, from 1.
    """
    if len(times_s) < 2:
        return
    is_finite = np.isfinite(times_s)
    if not is_finite.all():
        raise CorruptMediaError(name, f"the time in data row {int(np.argmin(is_finite)) + 1} is not a finite number")
    steps = np.diff(times_s)
    if (steps <= 0).any():
        row = int(np.argmax(steps <= 0)) + 2
        problem = "repeats the one before" if steps[row - 2] == 0 else "is earlier than the one before"
        raise CorruptMediaError(
            name, f"the time {times_s[row - 1]:.9g} s in data row {row} {problem}; expected times that grow"
        )  # fmt: skip
    mean = float(times_s[-1] - times_s[0]) / (len(times_s) - 1)
    is_off = np.abs(steps - mean) > STEP_TOLERANCE * mean
    if is_off.any():
        row = int(np.argmax(is_off)) + 2
        raise CorruptMediaError(
            name, f"the time step before data row {row} is {steps[row - 2]:.6g} s, the mean is {mean:.6g} s; expected "
            f"one rate, within {STEP_TOLERANCE:.0%}. Resample the file to a uniform clock first"
        )  # fmt: skip


def resample_linear(values: NDArray[np.float32], rate_hz: float, new_rate_hz: float) -> NDArray[np.float32]:
    """``values [T, C]`` at a new rate by linear interpolation; ``[resampled_rows(T), C]``.

    The first row stays; nothing is extrapolated. No low-pass filter stands before a reduction, so content above half
    of the new rate folds back: filter first where that matters.
    """
    rows = resampled_rows(len(values), rate_hz, new_rate_hz)
    where = np.minimum(np.arange(rows) * (rate_hz / new_rate_hz), len(values) - 1)
    left = np.minimum(where.astype(np.int64), max(len(values) - 2, 0))
    right = np.minimum(left + 1, len(values) - 1)
    share = (where - left).astype(np.float32)[:, None]
    result: NDArray[np.float32] = values[left] * (1 - share) + values[right] * share
    return result


def resampled_rows(num_rows: int, rate_hz: float, new_rate_hz: float) -> int:
    """How many rows a recording has at a new rate: as many as fit between its first and its last row.

    Example: 11 rows at 10 Hz last 1 s; at 4 Hz that is 5 rows, at 0, 0.25, 0.5, 0.75 and 1 s.
    """
    return math.floor((num_rows - 1) * (new_rate_hz / rate_hz) + 1e-6) + 1
