import json

import pytest

from polymodal.core.errors import ConfigError, DataError
from polymodal.data.quarantine import Failure, Quarantine


def failure(id, source="photos"):
    return Failure(source, id, "load", "CorruptMediaError", f"{id}.jpg: the file is truncated")


def test_each_sample_is_written_once(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.count(50, [failure("a"), failure("b")])
    quarantine.count(50, [failure("a"), failure("a", "other")])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["source"], line["id"]) for line in lines] == [("photos", "a"), ("photos", "b"), ("other", "a")]
    assert lines[0] == {
        "source": "photos", "id": "a", "stage": "load", "error": "CorruptMediaError",
        "reason": "a.jpg: the file is truncated",
    }  # fmt: skip
    assert (quarantine.num_tried, quarantine.num_failed, quarantine.num_recorded) == (100, 4, 3)
    assert quarantine.reasons == {"CorruptMediaError": 4}


def test_a_reopened_record_is_not_repeated_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).count(10, [failure("a"), failure("b")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        quarantine = Quarantine(path)
        assert quarantine.num_recorded == 1
        quarantine.count(10, [failure("a"), failure("b")])
        assert path.read_bytes() == whole


def test_the_rate_stops_the_run(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", max_rate=0.05, min_samples=200)
    quarantine.count(199, [failure(str(i)) for i in range(9)])
    quarantine.count(1, [failure("ten")])
    with pytest.raises(DataError) as caught:
        quarantine.count(1, [failure("one")])
    message = str(caught.value)
    assert "11 of 201 samples cannot be used, at most 5.0% are tolerated (max_bad_rate)" in message
    assert "the latest, from photos: one.jpg: the file is truncated" in message
    assert "q.jsonl" in message
    assert message.endswith("Repair the data or raise max_bad_rate")
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 11


def test_few_samples_are_not_judged():
    quarantine = Quarantine(max_rate=0.0, min_samples=200)
    quarantine.count(199, [failure("a")])
    with pytest.raises(DataError, match="2 of 200"):
        quarantine.count(1, [failure("b")])


def test_counters_are_restored():
    quarantine = Quarantine()
    quarantine.count(50, [failure("a")])
    other = Quarantine()
    other.restore(json.loads(json.dumps(quarantine.state())))
    assert other.state() == quarantine.state() == {"tried": 50, "reasons": {"CorruptMediaError": 1}}
    assert other.num_failed == 1


@pytest.mark.parametrize(("arguments", "message"), [
    ({"max_rate": 1.0}, "max_rate: found 1.0, expected at least 0 and below 1"),
    ({"max_rate": -0.1}, "max_rate: found -0.1"),
    ({"min_samples": 0}, "min_samples: found 0, expected at least 1"),
])  # fmt: skip
def test_bad_limits_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Quarantine(**arguments)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(DataError, match=r"line 1: found b'hello', expected a quarantine record .* name another one"):
        Quarantine(path)
