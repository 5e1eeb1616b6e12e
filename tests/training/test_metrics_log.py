"""The metrics file: one record per call, resumed without doubles, strict JSON."""

from __future__ import annotations

import json
import sys

import pytest

from polymodal.core.errors import DataError, MissingExtraError
from polymodal.training.metrics_log import MetricsLog, read_metrics


def write(path, steps, resume_step=0):
    with MetricsLog(path, resume_step) as log:
        for step in steps:
            log.append(step, {"loss": step / 2, "stage": "align"})


def test_every_record_is_on_the_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(1, {"loss": 0.5, "done": False, "note": None})
    assert read_metrics(path) == [{"step": 1, "loss": 0.5, "done": False, "note": None}]
    log.close()


def test_resuming_removes_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 8))
    write(path, [5, 6], resume_step=4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    write(path, [1])
    assert [record["step"] for record in read_metrics(path)] == [1], "a new run starts an empty log"


def test_the_same_run_broken_and_unbroken_leaves_the_same_bytes(tmp_path):
    write(tmp_path / "a", range(1, 6))
    write(tmp_path / "b", range(1, 5))
    write(tmp_path / "b", range(3, 6), resume_step=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_numbers_that_json_cannot_hold(tmp_path):
    with MetricsLog(tmp_path / "m") as log:
        log.append(1, {"a": float("nan"), "b": float("-inf")})
    line = (tmp_path / "m").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": "nan", "b": "-inf"}


def test_a_file_that_is_no_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2: found b'hello\\n', expected a JSON object with"):
        MetricsLog(path)


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        with MetricsLog(tmp_path / "m", resume, tensorboard=tmp_path / "board") as log:
            for step in steps:
                log.append(step, {"loss": step / 4 + resume, "stage": "align"})
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert {(e.step, e.value) for e in events.Scalars("loss")} == {(1, 0.25), (2, 1.5), (3, 1.75)}


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'tensorboard'.*pip install 'polymodal\[log\]'"):
        MetricsLog(tmp_path / "m", tensorboard=tmp_path / "board")
