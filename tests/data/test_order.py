import sys
import time

import numpy as np
import pytest

from polymodal.data.order import Permutation


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 16, 17, 99, 100, 101, 1000, 4097])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_index_comes_once(length, epoch):
    order = Permutation(length, seed=3, epoch=epoch)
    found = [order(position) for position in range(length)]
    assert sorted(found) == list(range(length))
    assert order.many(np.arange(length)).tolist() == found


def test_the_order_is_fixed_by_seed_and_epoch():
    base = [Permutation(50, 1, 0)(i) for i in range(50)]
    assert [Permutation(50, 1, 0)(i) for i in range(50)] == base
    assert base[:8] == [16, 37, 0, 29, 9, 2, 48, 24]
    assert [Permutation(50, 2, 0)(i) for i in range(50)] != base
    assert [Permutation(50, 1, 1)(i) for i in range(50)] != base


def test_small_lengths_reach_every_permutation():
    found = {tuple(Permutation(4, seed)(i) for i in range(4)) for seed in range(2000)}
    assert len(found) == 24


def test_batches_are_as_mixed_as_random_draws():
    """Distinct fiftieths of the data among 32 consecutive samples, against a true random permutation."""
    length = 20_000

    def strata(indices):
        return np.mean([len(set(row)) for row in (indices * 50 // length).reshape(-1, 32)])

    uniform = strata(np.random.default_rng(0).permutation(length))
    ours = strata(Permutation(length, 0).many(np.arange(length)))
    assert ours >= 0.98 * uniform


def test_seeking_far_is_immediate_and_small():
    start = time.perf_counter()
    order = Permutation(10**12, 0)
    assert 0 <= order(10**12 - 1) < 10**12
    assert time.perf_counter() - start < 0.1
    assert sum(sys.getsizeof(value) for value in vars(order).values()) < 1000


def test_positions_outside_are_refused():
    order = Permutation(5)
    for position in (-1, 5):
        with pytest.raises(IndexError, match=f"found position {position}, expected 0 to 4"):
            order(position)
        with pytest.raises(IndexError, match="outside 0 to 4"):
            order.many(np.asarray([0, position]))
    with pytest.raises(ValueError, match="found length 0, expected at least 1"):
        Permutation(0)
