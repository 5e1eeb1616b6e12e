import pytest

from polymodal.core.errors import ConfigError, DataError
from polymodal.data.mixing import InTurn, Mix, restore_counts


@pytest.mark.parametrize(
    "weights", [[1], [2, 1], [0.8, 0.2], [0.1, 0.2, 0.7], [5, 3, 3, 1, 1, 1], [1e-3, 1], [1 / 3, 2 / 3]]
)
def test_every_count_stays_within_one_of_its_share(weights):
    mix = Mix(weights)
    seen = [0] * len(weights)
    for drawn in range(1, 3001):
        source, position = mix.draw()
        assert position == seen[source]
        seen[source] += 1
        for count, weight in zip(seen, weights, strict=True):
            assert abs(count - drawn * weight / sum(weights)) < 1 + 1e-6
    assert mix.counts == seen


def test_weights_are_exact_after_every_round():
    mix = Mix([0.5, 0.3, 0.2])
    assert mix.shares() == [5, 3, 2]
    for turn in range(1, 20):
        for _ in range(10):
            mix.draw()
        assert mix.counts == [5 * turn, 3 * turn, 2 * turn]


def test_the_worked_example():
    mix = Mix([2, 1])
    assert [mix.draw() for _ in range(6)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1)]


def test_only_ratios_matter():
    first, second = Mix([2, 1]), Mix([0.5, 0.25])
    assert [first.draw() for _ in range(30)] == [second.draw() for _ in range(30)]


def test_counts_are_the_whole_state():
    mix = Mix([3, 1.5, 1])
    for _ in range(17):
        mix.draw()
    other = Mix([3, 1.5, 1])
    restore_counts(other, mix.counts)
    assert [mix.draw() for _ in range(50)] == [other.draw() for _ in range(50)]


def test_far_positions_stay_exact():
    mix = Mix([0.9, 0.1])
    restore_counts(mix, [9 * 10**17, 10**17])
    assert [mix.draw()[0] for _ in range(10)].count(1) == 1


def test_one_pass_takes_everything_in_order():
    turns = InTurn([2, 0, 3])
    assert [turns.draw() for _ in range(6)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), None]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ConfigError, match="expected a positive number; leave unused sources out"):
        Mix([1, weight])


def test_no_sources_are_refused():
    with pytest.raises(ConfigError, match="found no sources to mix, expected at least one"):
        Mix([])


@pytest.mark.parametrize("counts", [[1], [1, -1], [1, "a"]])
def test_a_foreign_state_is_refused(counts):
    with pytest.raises(DataError, match="expected 2 counts of samples; the state belongs to another run"):
        restore_counts(Mix([1, 1]), counts)
