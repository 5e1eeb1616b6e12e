import hashlib
import json
import random
import time

import numpy as np
import pytest

from polymodal.core.batch import Batch, Example, Plan
from polymodal.core.errors import ConfigError, CorruptMediaError, DataError, SampleError
from polymodal.core.samples import Sample
from polymodal.data.loader import BatchSpec, ListSource, Loader
from polymodal.data.quarantine import Quarantine


class Lengths:
    """A processor whose samples have ``meta['length']`` tokens and fail at the stage that ``meta['bad']`` names."""

    def __init__(self, jitter_s=0.0):
        self.jitter_s = jitter_s
        self.asked = []

    def plan(self, sample):
        if sample.meta.get("bad") == "plan":
            raise SampleError(sample.id, "its header is unreadable")
        number = int(hashlib.sha256(sample.id.encode()).hexdigest()[:6], 16)
        return Plan(sample.id, [number] * sample.meta["length"], [], [], {}, meta=dict(sample.meta))

    def reserve(self, plans):
        self.reserved = [plan.id for plan in plans]

    def load(self, plan, has_features=None):
        time.sleep(random.random() * self.jitter_s)
        if plan.meta.get("bad") == "load":
            raise CorruptMediaError(f"{plan.id}.jpg", "the file is truncated")
        if plan.meta.get("bad") == "bug":
            raise KeyError("a fault of the program")
        self.asked.append(has_features is not None and has_features(plan.id))
        return Example(plan, {})

    def collate(self, examples, packed):
        plans = [example.plan for example in examples]
        ids = np.asarray([token for plan in plans for token in plan.ids])
        lengths = tuple(plan.num_tokens for plan in plans) if packed else None
        names = [plan.id for plan in plans]
        return Batch(ids, ids > 0, ids >= 0, ids, lengths, {}, names, [None] * len(names), [()] * len(names))


def source(name, num, bad=None, seed=0):
    draw = random.Random(seed)
    bad = bad or {}
    samples = [Sample(f"{name}{i}", meta={"length": draw.randint(1, 40), "bad": bad.get(i)}) for i in range(num)]
    return ListSource(samples, name)


def sources():
    """Two sources with a few bad samples of either kind."""
    return [source("a", 37, {5: "plan", 11: "load", 30: "load"}), source("b", 11, {2: "plan", 7: "load"}, seed=1)]


PACKED = BatchSpec(tokens=100, buffer=8)
PADDED = BatchSpec(samples=4)


def loader(spec=PACKED, threads=2, data=None, quarantine=None, jitter_s=0.0, **more):
    quarantine = quarantine or Quarantine(max_rate=0.9)
    weights = None if more.get("once") else [0.7, 0.3]
    return Loader(
        data or sources(), weights, Lengths(jitter_s), spec, seed=1, quarantine=quarantine, threads=threads, **more
    )


def content(batch):
    return batch.sample_ids, batch.segment_lengths, batch.ids.tolist()


def first(reader, num):
    with reader:
        return [content(next(reader)) for _ in range(num)]


def names(batches):
    return [name for batch in batches for name in batch[0]]


def test_batches_are_full_ordered_and_weighted():
    batches = first(loader(), 60)
    assert all(list(lengths) == sorted(lengths) and sum(lengths) <= 100 for _, lengths, _ in batches)
    assert np.mean([sum(lengths) for _, lengths, _ in batches]) > 90
    share = np.mean([name.startswith("a") for name in names(batches)])
    assert abs(share - 0.7) < 0.03


def test_an_epoch_holds_every_good_sample_once():
    reader = Loader([source("a", 40)], None, Lengths(), PADDED)
    batches = first(reader, 20)
    for epoch in (batches[:10], batches[10:]):
        assert sorted(names(epoch)) == sorted(f"a{i}" for i in range(40))
    assert names(batches[:10]) != names(batches[10:])


@pytest.mark.parametrize("spec", [PACKED, PADDED])
def test_thread_count_and_timing_change_nothing(spec):
    expected = first(loader(spec, threads=1), 15)
    assert first(loader(spec, threads=4, jitter_s=0.002), 15) == expected


@pytest.mark.parametrize(
    "spec", [PACKED, PADDED, BatchSpec(tokens=100, samples=3, buffer=8), BatchSpec(samples=4, one_source=True)]
)
def test_killed_at_every_batch_it_continues_the_same(spec, tmp_path):
    """With mixing, packing, epochs, bad samples of both kinds, and another number of threads."""
    total = 30
    whole = loader(spec, quarantine=Quarantine(tmp_path / "whole.jsonl", max_rate=0.9))
    expected, states = [], [json.dumps(whole.state())]
    with whole:
        for _ in range(total):
            expected.append(content(next(whole)))
            states.append(json.dumps(whole.state()))
    assert max(len(state) for state in states) < 4096
    for done in range(0, total + 1):
        resumed = loader(spec, threads=1 + done % 3, quarantine=Quarantine(max_rate=0.9))
        resumed.restore(json.loads(states[done]))
        assert json.dumps(resumed.state()) == states[done]
        with resumed:
            num = min(4, total - done)
            assert [content(next(resumed)) for _ in range(num)] == expected[done : done + num]
            assert json.dumps(resumed.state()) == states[done + num]


def test_the_same_loader_can_go_back_and_be_closed():
    reader = loader()
    state = reader.state()
    expected = [content(next(reader)) for _ in range(6)]
    reader.restore(state)
    assert [content(next(reader)) for _ in range(3)] == expected[:3]
    reader.close()
    assert [content(next(reader)) for _ in range(3)] == expected[3:]
    reader.close()


def test_bad_samples_are_named_once_and_the_rest_comes(tmp_path):
    quarantine = Quarantine(tmp_path / "bad.jsonl", max_rate=0.5)
    seen = set(names(first(loader(PADDED, quarantine=quarantine), 60)))
    assert seen == ({f"a{i}" for i in range(37)} | {f"b{i}" for i in range(11)}) - {"a5", "a11", "a30", "b2", "b7"}
    records = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    found = {(one["source"], one["id"], one["stage"], one["reason"]) for one in records}
    assert len(records) == 5
    assert ("a", "a5", "plan", "sample a5: its header is unreadable") in found
    assert ("b", "b7", "load", "b7.jpg: the file is truncated") in found
    assert quarantine.num_failed > 5


def test_damaged_content_leaves_its_batch_smaller_but_ordered():
    good = first(loader(PADDED, data=[source("a", 37), source("b", 11, seed=1)]), 20)
    bad = [source("a", 37, {11: "load"}), source("b", 11, {7: "load"}, seed=1)]
    damaged = first(loader(PADDED, data=bad), 20)
    assert [[name for name in batch[0] if name not in ("a11", "b7")] for batch in good] == [b[0] for b in damaged]


def test_too_many_bad_samples_stop_the_run_at_the_same_place_after_a_resume():
    bad = dict.fromkeys(range(0, 50, 3), "load")

    def reader():
        return loader(PADDED, data=[source("a", 50, bad), source("b", 5)], quarantine=Quarantine(None, 0.2, 30))

    def rest(one):
        batches = []
        with pytest.raises(DataError, match=r"samples cannot be used, at most 20.0% are tolerated") as caught:
            while True:
                batches.append((content(next(one)), one.state()))
        with pytest.raises(DataError):
            next(one)
        return batches, str(caught.value)

    batches, message = rest(reader())
    assert len(batches) >= 5
    resumed = reader()
    resumed.restore(batches[2][1])
    assert rest(resumed) == (batches[3:], message)


@pytest.mark.parametrize("stage", ["plan", "load"])
def test_nothing_but_bad_samples_ends(stage):
    reader = Loader([source("a", 9, dict.fromkeys(range(9), stage))], None, Lengths(), PADDED)
    with pytest.raises(DataError, match="200 of 200 samples cannot be used"):
        next(reader)


def test_a_fault_of_the_program_is_not_a_bad_sample():
    reader = loader(PADDED, data=[source("a", 5, {3: "bug"}), source("b", 5)])
    for _ in range(2):
        with pytest.raises(KeyError, match="a fault of the program"):
            for _ in range(10):
                next(reader)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("spec", [PACKED, PADDED])
def test_ranks_share_the_batches_of_one(spec, world):
    alone = first(loader(spec), 12)
    ranks = [first(loader(spec, share=(rank, world)), 12 // world) for rank in range(world)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == alone


def test_a_run_continues_on_another_number_of_ranks():
    alone = first(loader(), 14)
    state = None
    for world, start, stop in ((1, 0, 2), (2, 2, 6), (4, 6, 14)):
        ranks, states = [], []
        for rank in range(world):
            reader = loader(share=(rank, world))
            if state is not None:
                reader.restore(state)
            ranks.append(first(reader, (stop - start) // world))
            states.append({key: value for key, value in reader.state().items() if key != "quarantine"})
        assert [batch for step in zip(*ranks, strict=True) for batch in step] == alone[start:stop]
        assert all(one == states[0] for one in states)
        state = reader.state()


def test_ranks_count_each_bad_sample_once():
    alone = Quarantine(max_rate=0.9)
    first(loader(quarantine=alone), 12)
    ranks = [Quarantine(max_rate=0.9) for _ in range(3)]
    for rank in range(3):
        first(loader(quarantine=ranks[rank], share=(rank, 3)), 4)
    assert sum(one.num_tried for one in ranks) == alone.num_tried
    assert sum(one.num_failed for one in ranks) == alone.num_failed > 0


@pytest.mark.parametrize("spec", [PACKED, PADDED])
@pytest.mark.parametrize("world", [1, 3])
def test_one_pass_takes_every_sample_once(spec, world):
    seen = []
    for rank in range(world):
        with loader(spec, once=True, share=(rank, world)) as reader:
            seen += names([content(batch) for batch in reader])
            with pytest.raises(StopIteration):
                next(reader)
    bad = {"a5", "a11", "a30", "b2", "b7"}
    assert sorted(seen) == sorted(({f"a{i}" for i in range(37)} | {f"b{i}" for i in range(11)}) - bad)


def test_one_pass_by_samples_is_in_order_and_keeps_the_last_part():
    with Loader([source("a", 6), source("b", 4)], None, Lengths(), PADDED, once=True) as reader:
        assert [batch.sample_ids for batch in reader] == [
            ["a0", "a1", "a2", "a3"], ["a4", "a5", "b0", "b1"], ["b2", "b3"],
        ]  # fmt: skip


def test_one_pass_counts_bad_samples_at_the_very_end():
    quarantine = Quarantine(max_rate=0.9)
    data = [source("a", 10, {8: "plan", 9: "plan"})]
    with loader(BatchSpec(samples=4), data=data, quarantine=quarantine, once=True) as reader:
        assert [batch.num_samples for batch in reader] == [4, 4]
    assert (quarantine.num_tried, quarantine.num_failed) == (10, 2)


def test_one_pass_resumes():
    with loader(once=True) as reader:
        expected = [content(next(reader)) for _ in range(3)]
        state = reader.state()
        expected += [content(batch) for batch in reader]
    resumed = loader(once=True)
    resumed.restore(state)
    with resumed:
        assert [content(batch) for batch in resumed] == expected[3:]


def test_samples_too_long_for_a_pack_are_quarantined():
    quarantine = Quarantine(max_rate=0.9)
    first(loader(BatchSpec(tokens=39, buffer=8), quarantine=quarantine, data=[source("a", 30)] * 2), 30)
    assert quarantine.num_failed > 0


def test_cached_features_are_asked_for():
    reader = loader(PADDED, data=[source("a", 3), source("b", 3)], cache={"a1", "b0"})
    first(reader, 3)
    assert {True, False} == set(reader._processor.asked)


def test_a_changed_source_is_refused_and_the_place_kept():
    state = loader().state()
    changed = loader(data=[source("a", 37), source("b", 12)])
    expected = first(changed, 2)
    changed = loader(data=[source("a", 37), source("b", 12)])
    next(changed)
    with pytest.raises(DataError, match=r"b: the data changed since the loader state was saved .* or start a new run"):
        changed.restore(state)
    assert content(next(changed)) == expected[1]
    changed.close()


@pytest.mark.parametrize(("change", "message"), [
    ({"spec": PADDED}, "has batch .*, this run has"),
    ({"once": True}, r"has weights \[7, 3\], this run has \[37, 11\]"),
    ({"data": [source("a", 37)] * 3}, "found 2 weights for 3 sources"),
])  # fmt: skip
def test_another_configuration_is_refused(change, message):
    state = loader().state()
    with pytest.raises((DataError, ConfigError), match=message):
        loader(**change).restore(state)
    with pytest.raises(DataError, match="found loader state version 9, expected 1"):
        loader().restore({**state, "version": 9})


@pytest.mark.parametrize(("arguments", "message"), [
    ({"threads": 0}, "threads: found 0, expected at least 1"),
    ({"share": (2, 2)}, "found rank 2 of world 2"),
    ({"weights": [1.0], "once": True}, "found weights for one pass"),
])  # fmt: skip
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Loader([source("a", 3)], **{"weights": None, "processor": Lengths(), "batch": PADDED} | arguments)


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="a: has no samples, expected at least one"):
        Loader([source("a", 0)], None, Lengths(), PADDED)


@pytest.mark.parametrize("data", [{}, {"samples": 4, "packed": True}, {"tokens": 9, "packed": False}, {"packed": True}])
def test_a_spec_that_disagrees_is_refused(data):
    with pytest.raises(ConfigError, match=r"a (packed|padded) batch needs"):
        BatchSpec.parse(data)


def test_a_spec_survives_its_data():
    for spec in (PACKED, PADDED):
        assert BatchSpec.parse(spec.to_data()) == spec
    assert BatchSpec.parse({"tokens": 9}).packed
    assert not PADDED.packed


def test_the_first_fault_of_a_batch_is_raised_whatever_the_timing():
    class Late(Lengths):
        def load(self, plan, has_features=None):
            time.sleep(0.02 if plan.id == "a0" else 0)
            raise KeyError(plan.id)

    with pytest.raises(KeyError, match="a0"):
        next(Loader([source("a", 4)], None, Late(), PADDED, threads=3, once=True))


def test_every_batch_is_announced_before_it_is_loaded():
    processor = Lengths()
    with Loader([source("a", 3)], None, processor, PADDED, once=True) as reader:
        batches = list(reader)
    assert [batch.sample_ids for batch in batches] == [processor.reserved] == [["a0", "a1", "a2"]]


def test_kinds_are_one_batch_per_source_and_move_nothing():
    spec = BatchSpec(samples=4, one_source=True)
    reader = loader(spec)
    state = reader.state()
    kinds = list(reader.kinds())
    assert [round(share, 3) for share, _ in kinds] == [0.7, 0.3]
    assert [{name[0] for name in batch.sample_ids} for _, batch in kinds] == [{"a"}, {"b"}]
    assert reader.state() == state and first(reader, 3) == first(loader(spec), 3)
    assert reader.quarantine.num_tried > 0 and list(loader(PADDED).kinds()) == []


def test_a_source_of_bad_samples_alone_has_no_kind():
    data = [source("a", 8), source("b", 4, dict.fromkeys(range(4), "plan"))]
    kinds = list(loader(BatchSpec(samples=4, one_source=True), data=data).kinds())
    assert [batch.sample_ids[0][0] for _, batch in kinds] == ["a"]
