"""An interrupted evaluation goes on after the last batch that it stored."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymodal.evaluation.runner import evaluate
from polymodal.evaluation.tasks import MatchingTask, QuestionsTask

COLOURS = ("red", "green", "blue")


class Reader:
    """Knows a colour from a picture's name; counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def answer(self, samples: Any, max_new_tokens: int) -> list[str]:
        self.calls.append(len(samples))
        return [Path(sample.media()[0].name).name.split("-")[0] if sample.media() else "" for sample in samples]

    def match(self, samples: Any) -> Any:
        self.calls.append(len(samples))
        return np.array([0.5 + 0.4 * bool(sample.media()) for sample in samples])


def write_questions(folder: Path, num: int = 60) -> Path:
    lines = []
    for i in range(num):
        content = [{"type": "image", "path": f"{COLOURS[i % 3]}-{i}.png"}, {"type": "text", "text": "Which colour?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": COLOURS[i % 3]}]
        lines.append(json.dumps({"id": f"q{i}", "messages": messages}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


class Mortal(Reader):
    """Kills its process when it is asked for a batch too many."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def answer(self, samples: Any, max_new_tokens: int) -> list[str]:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return super().answer(samples, max_new_tokens)


def killed_after(batches: int, task: QuestionsTask, path: Path, fingerprint: str = "m") -> None:
    """Evaluate in a child that is killed when it asks once more."""
    child = os.fork()
    if child == 0:
        evaluate(Mortal(batches), task, predictions=path, fingerprint=fingerprint)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def records(path: Path) -> list[dict[str, Any]]:
    """Without times, which no two evaluations share."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture
def task(tmp_path: Path) -> QuestionsTask:
    return QuestionsTask(data=str(write_questions(tmp_path)), max_new_tokens=7, batch_size=8)


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path, task: QuestionsTask) -> None:
    whole, stored, part = tmp_path / "whole.jsonl", tmp_path / "p.jsonl", tmp_path / "p.jsonl.part"
    first = Reader()
    expected = evaluate(first, task, predictions=whole, fingerprint="m")
    for batches in (3, 2, 7):
        killed_after(batches, task, stored)
        assert not stored.exists()
    assert len(records(part)) == 1 + 7 * 8 + 4 + 4 * 8
    second = Reader()
    report = evaluate(second, task, predictions=stored, fingerprint="m")
    assert second.calls == first.calls[12:]
    assert records(stored) == records(whole) and not part.exists()
    assert (report.overall, report.rows) == (expected.overall, expected.rows)


def test_a_batch_that_was_cut_off_is_asked_again(tmp_path: Path, task: QuestionsTask) -> None:
    stored, part = tmp_path / "p.jsonl", tmp_path / "p.jsonl.part"
    killed_after(2, task, stored)
    lines = part.read_bytes().splitlines(keepends=True)
    for cut in (lines[12][:20], b"{no JSON}\n", lines[12][:-1]):
        part.write_bytes(b"".join(lines[:12]) + cut)
        model = Reader()
        evaluate(model, task, predictions=stored, fingerprint="m")
        assert sum(model.calls[:7]) == 52
        asked = [(record["condition"], record["id"]) for record in records(stored)[1:]]
        assert len(asked) == len(set(asked))
        assert [id for _, id in asked[:60]] == [f"q{i}" for i in range(60)]


def test_what_another_evaluation_stored_is_not_kept(tmp_path: Path, task: QuestionsTask) -> None:
    stored = tmp_path / "p.jsonl"
    whole = Reader()
    evaluate(whole, task, fingerprint="m")
    changed = {
        "model": lambda: evaluate(model, task, predictions=stored, fingerprint="other"),
        "no fingerprint": lambda: evaluate(model, task, predictions=stored),
        "task": lambda: evaluate(model, task.model_copy(update={"seed": 1}), predictions=stored, fingerprint="m"),
        "data": lambda: (write_questions(tmp_path, 59), evaluate(model, task, predictions=stored, fingerprint="m")),
    }
    for what, measure in changed.items():
        killed_after(4, task, stored)
        model = Reader()
        measure()
        assert sum(model.calls[:8]) == (59 if what == "data" else 60), what
        assert not (tmp_path / "p.jsonl.part").exists()


def test_tasks_of_facts_go_on_as_well(tmp_path: Path) -> None:
    class Stops(Reader):
        def match(self, samples: Any) -> Any:
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().match(samples)

    lines = [{"id": str(i), "views": {"image": f"{i}.png", "text": f"a {COLOURS[i % 3]} {i}"}} for i in range(60)]
    (tmp_path / "views.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    groups = {"colour": COLOURS}
    task = MatchingTask(data=str(tmp_path / "views.jsonl"), groups=groups, batch_size=40)
    whole, resumed, stored = Reader(), Reader(), tmp_path / "p.jsonl"
    expected = evaluate(whole, task)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Stops(), task, predictions=stored, fingerprint="m")
    report = evaluate(resumed, task, predictions=stored, fingerprint="m")
    assert resumed.calls == whole.calls[3:]
    assert report.rows == expected.rows and records(stored)[0]["model"] == "m"
