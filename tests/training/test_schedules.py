"""Schedules: every value by hand, limits, and messages."""

from __future__ import annotations

import itertools
import math

import pytest

from polymodal.core.errors import ConfigError
from polymodal.training.schedules import SCHEDULES, Constant, Cosine, Linear


@pytest.mark.parametrize("use", SCHEDULES)
def test_warm_up_then_never_above_one_and_never_rising(use):
    schedule = SCHEDULES.parse({"use": use, "warmup": 4})
    factors = [schedule.factor(step, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[4:])) and min(factors) >= 0
    assert SCHEDULES.parse(schedule.to_data()) == schedule


def test_values():
    assert [Constant().factor(step, 4) for step in range(5)] == [1.0] * 5
    assert [Linear().factor(step, 4) for step in range(5)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert [Linear(min_ratio=0.5).factor(step, 4) for step in range(5)] == pytest.approx([1, 0.875, 0.75, 0.625, 0.5])
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert [Cosine(min_ratio=0.1).factor(step, 4) for step in range(5)] == pytest.approx(expected)
    assert Cosine(min_ratio=0.1).factor(99, 4) == pytest.approx(0.1)


def test_warm_up_as_a_fraction_is_rounded_up():
    assert Cosine(warmup=0.03).warmup_steps(2180) == 66
    assert Cosine(warmup=0.03).warmup_steps(10) == 1
    assert Cosine(warmup=1).warmup_steps(10) == 1
    assert Cosine().warmup_steps(10) == 0
    assert Cosine(warmup=10).factor(9, 10) == 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"use": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"use": "linear", "warmup": 1.5}, "found 1.5, expected a fraction below 1 or a whole number of steps"),
        ({"use": "linear", "warmup": -1}, "warmup: Input should be greater than or equal to 0; found -1"),
        ({"use": "cosine", "min_ratio": 2}, "min_ratio: Input should be less than or equal to 1"),
        ({"use": "constant", "min_ratio": 0.1}, "unknown key 'min_ratio'"),
        ({"use": "cosine", "warmup": 30}, "schedule cosine: warmup is 30 steps, the stage has 20; expected at most 20"),
    ],
)
def test_messages(data, message):
    with pytest.raises(ConfigError, match=message):
        SCHEDULES.parse(data).factor(0, 20)
