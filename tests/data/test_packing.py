import itertools

import numpy as np
import pytest

from polymodal.core.batch import Plan
from polymodal.core.errors import ConfigError, SampleError
from polymodal.data.packing import Entry, FixedGroups, Packer, best_subset, pack_all


def plans_of(lengths):
    return [Plan(str(i), [0] * length, [], [], {}) for i, length in enumerate(lengths)]


def length_mix(num, log_mean, seed=0):
    """Lognormal text with 0 to 4 images of 144 to 1280 tokens, as long as it fits 4096."""
    random = np.random.default_rng(seed)
    lengths = []
    while len(lengths) < num:
        text = int(np.clip(random.lognormal(log_mean, 1.0), 8, 2000))
        length = text + int(random.integers(144, 1281, random.integers(0, 5)).sum())
        if length <= 4096:
            lengths.append(length)
    return lengths


def lengths_of(pack):
    return [plan.num_tokens for plan in pack]


def test_the_worked_example():
    packs = list(pack_all(plans_of([6, 5, 3, 4]), Packer(10, buffer=4)))
    assert [lengths_of(pack) for pack in packs] == [[4, 6], [3, 5]]


@pytest.mark.parametrize("seed", range(20))
def test_the_subset_is_the_best_one(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 12, 9).tolist()
    values = random.integers(1, 50, 9).tolist()
    capacity = int(random.integers(0, 40))
    chosen = best_subset(lengths, values, capacity)
    assert len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) <= capacity
    every = itertools.chain.from_iterable(itertools.combinations(range(9), n) for n in range(10))
    best = max(sum(values[i] for i in some) for some in every if sum(lengths[i] for i in some) <= capacity)
    assert sum(values[i] for i in chosen) == best


@pytest.mark.parametrize("log_mean", [4.0, 5.0, 6.0])
def test_fill_and_waiting_on_the_length_mix(log_mean):
    """At buffer 64: fill at least 0.99, every sample packed once, none passed over more than 4 x 64 + 64 times."""
    plans = plans_of(length_mix(2500, log_mean))
    packer = Packer(4096, buffer=64)
    packed, fills, ages = [], [], []
    for position, plan in enumerate(plans):
        packer.add(Entry((0, position), plan))
        while packer.is_full:
            pack = packer.take()
            packed += pack
            fills.append(sum(entry.plan.num_tokens for entry in pack) / 4096)
            ages += [entry.age for entry in pack]
    assert max(fills) <= 1.0
    assert np.mean(fills) >= 0.99
    assert max(ages) <= 320
    rest = [entry.place for entry in packer.held()]
    assert sorted([entry.place for entry in packed] + rest) == [(0, i) for i in range(len(plans))]


def test_nothing_starves():
    """A stream of halves fits without the odd one, which is forced out after 4 x buffer packs."""
    packer = Packer(10, buffer=4)
    packer.add(Entry((0, 0), Plan("odd", [0] * 7, [], [], {})))
    for position in range(1, 1000):
        while not packer.is_full:
            packer.add(Entry((0, position), Plan("half", [0] * 5, [], [], {})))
        pack = packer.take()
        if "odd" in [entry.plan.id for entry in pack]:
            break
    assert position <= 17


def test_short_samples_fill_packs_beyond_the_buffer():
    packs = list(pack_all(plans_of([10] * 1000), Packer(1000, buffer=8)))
    assert [len(pack) for pack in packs] == [100] * 10


def test_max_samples_bounds_a_pack():
    packs = list(pack_all(plans_of([1, 2, 3] * 40), Packer(100, buffer=8, max_samples=5)))
    assert max(len(pack) for pack in packs) == 5
    assert sum(len(pack) for pack in packs) == 120


def test_equal_lengths_are_neighbours():
    for pack in pack_all(plans_of([3, 5, 3, 5, 3, 5] * 10), Packer(24, buffer=12)):
        assert lengths_of(pack) == sorted(lengths_of(pack))


def test_held_samples_restore_the_packer():
    plans = plans_of(length_mix(300, 5.0))
    packer = Packer(4096, buffer=16)
    for position, plan in enumerate(plans[:200]):
        packer.add(Entry((0, position), plan))
        if packer.is_full:
            packer.take()
    other = Packer(4096, buffer=16)
    for entry in packer.held():
        other.add(Entry(entry.place, plans[entry.place[1]], entry.age))
    for position, plan in enumerate(plans[200:], start=200):
        packer.add(Entry((0, position), plan))
        other.add(Entry((0, position), plan))
        if packer.is_full:
            assert [entry.place for entry in packer.take()] == [entry.place for entry in other.take()]


def test_too_long_a_sample_is_refused_by_name():
    with pytest.raises(SampleError, match=r"sample 0: has 11 tokens, a pack holds 10 and samples are never cut; raise"):
        list(pack_all(plans_of([11]), Packer(10)))


def test_a_sample_without_tokens_is_refused_by_name():
    with pytest.raises(SampleError, match=r"sample 0: has no tokens to pack .*; set the batch by samples"):
        list(pack_all(plans_of([0]), Packer(10)))


@pytest.mark.parametrize("arguments", [(0, 1, None), (1, 0, None), (1, 1, 0)])
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(ConfigError, match="found 0, expected at least 1"):
        Packer(*arguments)


def test_fixed_groups_keep_the_order():
    groups = FixedGroups(2)
    for position, plan in enumerate(plans_of([0, 0, 0])):
        groups.add(Entry((0, position), plan))
    assert groups.is_full
    assert [entry.place[1] for entry in groups.take()] == [0, 1]
    assert [entry.place[1] for entry in groups.held()] == [2]
    assert not groups.is_full
    assert len(groups.take()) == 1
    assert groups.take() == []


def test_groups_of_one_source_never_mix_sources():
    groups = FixedGroups(2, one_source=True)
    plans = plans_of([0] * 5)
    for place, plan in zip([(0, 0), (1, 0), (0, 1), (2, 0), (1, 1)], plans, strict=True):
        groups.add(Entry(place, plan))
    assert groups.is_full
    assert [entry.place for entry in groups.take()] == [(0, 0), (0, 1)]
    assert [entry.place for entry in groups.take()] == [(1, 0), (1, 1)]
    assert not groups.is_full
    assert [entry.place for entry in groups.held()] == [(2, 0)]
    assert [entry.place for entry in groups.take()] == [(2, 0)]
    assert groups.take() == []
