import json
from pathlib import Path

import numpy as np
import pytest

from polymodal.core.errors import ConfigError, CorruptMediaError, DataError, SampleError
from polymodal.core.parts import Text
from polymodal.evaluation.runner import evaluate
from polymodal.evaluation.scores import Report, rescore
from polymodal.evaluation.tasks import TASKS, QuestionsTask, RetrievalTask, read_samples

COLOURS = ("red", "green", "blue")


def write_questions(folder: Path, num: int = 60) -> Path:
    """Family ``colour`` needs the image; ``sound_colour`` needs image and audio; names say what is in a file."""
    lines = []
    for i in range(num):
        colour = COLOURS[i % 3]
        image = {"type": "image", "path": f"{colour}-{i}.png"}
        audio = {"type": "audio", "path": f"beep-{i}.wav"}
        family = ("colour", "sound_colour")[i % 2]
        parts = [image] if family == "colour" else [image, audio]
        content = [*parts, {"type": "text", "text": f"Which colour, {'please' if i % 4 < 2 else 'now'}?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": colour.title() + "."}]
        lines.append(json.dumps({"id": f"q{i}", "messages": messages, "meta": {"family": family}}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


class Reader:
    """Answers from the file names: knows a colour from an image, and needs the sound too where a question has one."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def answer(self, samples, max_new_tokens):
        assert max_new_tokens == 7
        self.calls.append(len(samples))
        return [self._one(sample) for sample in samples]

    def _one(self, sample):
        names = {part.modality: Path(part.name).name for part in sample.media()}
        for name in names.values():
            if "corrupt" in name:
                raise CorruptMediaError(name, "is broken")
        needed = {"image", "audio"} if sample.meta["family"] == "sound_colour" else {"image"}
        return names["image"].split("-")[0] if needed <= set(names) else ""

    def embed(self, parts):
        vectors = []
        for part in parts:
            name = part.text if isinstance(part, Text) else Path(part.name).name
            if "corrupt" in name:
                raise CorruptMediaError(name, "is broken")
            vectors.append(np.eye(4)[COLOURS.index(name.split("-")[0])])
        return np.array(vectors, dtype=np.float32)


def test_every_condition(tmp_path):
    task = QuestionsTask(data=str(write_questions(tmp_path)), max_new_tokens=7, batch_size=8)
    done = []
    stored = tmp_path / "out" / "predictions.jsonl"
    report = evaluate(Reader(), task, predictions=stored, progress=lambda *state: done.append(state))
    assert [row.family for row in report.rows] == ["colour", "sound_colour"]
    assert report.task == "questions"
    for row in (*report.rows, report.overall):
        assert row.score.value == 1.0
        assert row.controls["blind"].value == 0.0
        assert 0.2 <= row.controls["shuffled"].value <= 0.5
        assert row.controls["majority"].value == pytest.approx(1 / 3)
        assert row.controls["wording"].value <= 0.5
        assert row.score.n == row.controls["shuffled"].n == (60 if row.family == "overall" else 30)
        assert row.empty_rate == row.unknown_rate == 0.0
    colour, both = report.rows
    assert "without_audio" not in colour.controls
    assert both.controls["without_audio"].value == both.controls["without_image"].value == 0.0
    assert report.overall.controls["without_image"].n == 30
    assert {state[0] for state in done} == {"full", "blind", "shuffled", "without_audio", "without_image"}
    assert [state[1:] for state in done if state[0] == "full"][-1] == (60, 60)
    assert rescore(stored) == report
    assert Report.from_data(json.loads(json.dumps(report.to_data()))) == report
    assert set(report.seconds) == {"full", "blind", "shuffled", "majority", "wording", "without_audio", "without_image"}


def test_conditions_and_limits(tmp_path):
    data = str(write_questions(tmp_path))
    task = QuestionsTask(data=data, limit=12, control_limit=5, max_new_tokens=7, name="colours")
    report = evaluate(Reader(), task, conditions=("shuffled", "blind"))
    assert (report.task, report.overall.score.n) == ("colours", 24)
    assert set(report.overall.controls) == {"blind", "shuffled"}
    assert report.overall.controls["blind"].n == report.overall.controls["shuffled"].n == 10
    assert evaluate(Reader(), task, conditions=("full",)).overall.controls == {}
    with pytest.raises(ConfigError, match="unknown condition 'blnd'; did you mean 'blind'"):
        evaluate(Reader(), task, conditions=("blnd",))


def test_wrong_empty_and_unknown_answers_are_counted(tmp_path):
    class Fixed:
        def answer(self, samples, max_new_tokens):
            return [["red", "", "purple", "THE red!"][i % 4] for i in range(len(samples))]

    task = QuestionsTask(data=str(write_questions(tmp_path)), batch_size=60)
    overall = evaluate(Fixed(), task, conditions=("full",)).overall
    assert (overall.empty_rate, overall.unknown_rate) == (0.25, 0.5)
    assert overall.score.value == pytest.approx(1 / 6)
    assert overall.score.low < overall.score.value < overall.score.high


def test_a_corrupt_sample_is_named_and_costs_only_itself(tmp_path):
    path = write_questions(tmp_path)
    path.write_text(path.read_text().replace("red-0.png", "corrupt-0.png"))
    report = evaluate(Reader(), QuestionsTask(data=str(path), max_new_tokens=7), conditions=("full",))
    assert report.errors == ("q0: corrupt-0.png: is broken",)
    assert report.overall.score.value == pytest.approx(59 / 60)


def test_a_model_that_loses_answers_is_refused(tmp_path):
    class Short:
        def answer(self, samples, max_new_tokens):
            return ["red"]

    with pytest.raises(DataError, match="the model gave 1 answers to 32 questions"):
        evaluate(Short(), QuestionsTask(data=str(write_questions(tmp_path))))


def write_views(folder: Path, num: int = 12) -> Path:
    lines = [
        {
            "id": f"v{i}",
            "label": COLOURS[i % 3],
            "views": {"image": f"{COLOURS[i % 3]}-{i}.png", "text": COLOURS[i % 3]},
        }
        for i in range(num)
    ]
    path = folder / "views.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_retrieval_by_label_and_by_sample(tmp_path):
    data = str(write_views(tmp_path))
    stored = tmp_path / "predictions.jsonl"
    by_label = RetrievalTask(data=data, query="image", target="text", positives="label", ks=(1, 2))
    report = evaluate(Reader(), by_label, predictions=stored)
    assert report.overall.score.value == 1.0
    assert report.overall.metrics == {"R@1": 1.0, "R@2": 1.0, "MRR": 1.0, "class precision@1": 1.0}
    assert report.overall.controls["chance"].value == pytest.approx(1 / 3)
    assert rescore(stored) == report
    by_sample = RetrievalTask(data=data, query="image", target="text", ks=(1, 4))
    report = evaluate(Reader(), by_sample)
    # Four candidates share the colour and their score; ties count against the model.
    assert report.overall.metrics["R@1"] == 0.0
    assert report.overall.metrics["R@4"] == 1.0
    assert report.overall.metrics["class precision@1"] == 1.0


def test_a_query_never_finds_itself(tmp_path):
    task = RetrievalTask(data=str(write_views(tmp_path)), query="image", target="image", positives="label")
    stored = tmp_path / "predictions.jsonl"
    assert evaluate(Reader(), task, predictions=stored).overall.score.value == 1.0
    for line in stored.read_text().splitlines()[1:]:
        record = json.loads(line)
        assert record["candidates"] == 11
        assert record["id"] not in [hit["id"] for hit in record["top"]]
    with pytest.raises(DataError, match="no image view has a right image view"):
        evaluate(Reader(), RetrievalTask(data=task.data, query="image", target="image"))


def test_retrieval_names_what_it_cannot_use(tmp_path):
    path = write_views(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["views"]["image"] = "corrupt-0.png"
    del lines[1]["label"]
    del lines[2]["views"]["text"]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    task = RetrievalTask(data=str(path), query="image", target="text", positives="label", batch_size=5)
    report = evaluate(Reader(), task)
    assert report.errors == ("v0: corrupt-0.png: is broken",)
    assert report.skipped == 1
    assert report.overall.score.n == 10
    assert evaluate(Reader(), RetrievalTask(**{**task.to_data(), "limit": 9})).overall.score.n < 10
    with pytest.raises(DataError, match="no video view could be embedded: found 0 of 12"):
        evaluate(Reader(), RetrievalTask(data=str(path), query="video", target="text"))


def test_embeddings_must_have_unit_length(tmp_path):
    class Long(Reader):
        def embed(self, parts):
            return super().embed(parts) * 2

    task = RetrievalTask(data=str(write_views(tmp_path)), query="image", target="text")
    with pytest.raises(DataError, match=r"shape \(12, 4\) with lengths 2.000 to 2.000; expected \[12, D\] of unit"):
        evaluate(Long(), task)


def test_task_configs():
    for name in TASKS:
        assert "use" in TASKS[name].model_fields
    task = TASKS.parse({"use": "retrieval", "data": "a/views.jsonl", "query": "image", "target": "text"})
    assert TASKS.parse(task.to_data()) == task
    assert task.title == "views"
    for wrong, message in (
        ({"use": "questions", "data": "x", "conditions": ["bling"]}, "unknown condition 'bling'"),
        ({"use": "retrieval", "data": "x", "query": "img", "target": "text"}, "unknown modality 'img'"),
        ({"use": "retrieval", "data": "x", "query": "image", "target": "text", "ks": []}, "at least one K"),
        ({"use": "question", "data": "x"}, "did you mean 'questions'"),
    ):
        with pytest.raises(ConfigError, match=message):
            TASKS.parse(wrong)
    assert QuestionsTask(data="x", conditions=("wording", "blind")).conditions == ("full", "blind", "wording")


def test_unreadable_data_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read: No such file"):
        list(read_samples(tmp_path / "none.jsonl"))
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "1", "messages": [{"role": "user", "content": "Hi"}]}\n{"id"\n')
    with pytest.raises(SampleError, match=r"bad.jsonl:2: is not valid JSON"):
        list(read_samples(path))
    path.write_text('{"id": "1", "messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(SampleError, match="sample 1: expected a conversation that ends with the assistant's answer"):
        evaluate(Reader(), QuestionsTask(data=str(path)))
    path.write_text("")
    with pytest.raises(DataError, match="holds no samples"):
        evaluate(Reader(), QuestionsTask(data=str(path)))
    same = '{"id": "1", "messages": [{"role": "user", "content": "Hi"}], "meta": {"answer": "x"}}\n'
    path.write_text(same * 2)
    with pytest.raises(DataError, match="1 samples share an id"):
        evaluate(Reader(), QuestionsTask(data=str(path)))


def test_damaged_predictions_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    for text, message in (
        ("", "no header of format 1"),
        ('{"a": 1}\n', "no header"),
        ('{"polymodal', "p.jsonl:1: not"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            rescore(path)
    with pytest.raises(DataError, match="cannot be read"):
        rescore(tmp_path / "none")


def test_families_are_chosen(tmp_path):
    data = str(write_questions(tmp_path))
    report = evaluate(Reader(), QuestionsTask(data=data, max_new_tokens=7, families=("colour",)))
    assert [row.family for row in report.rows] == ["colour"] and report.overall.score.n == 30
    with pytest.raises(DataError, match=r"has no questions of the family 'size'; expected some of each: families"):
        evaluate(Reader(), QuestionsTask(data=data, families=("colour", "size")))


def test_the_best_of_several_vectors_counts(tmp_path):
    class Several(Reader):
        """Each picture has a vector that says nothing, and one that says its colour; texts have one."""

        def embed(self, parts):
            one = super().embed(parts)
            if isinstance(parts[0], Text):
                return one
            return np.stack([np.tile(np.eye(4, dtype=np.float32)[3], (len(parts), 1)), one], axis=1)

    for query, target in (("image", "text"), ("text", "image")):
        task = RetrievalTask(data=str(write_views(tmp_path)), query=query, target=target, positives="label")
        assert evaluate(Several(), task).overall.score.value == evaluate(Reader(), task).overall.score.value == 1.0
