"""Tasks about the facts that texts state: what is asked, under which controls, and what a report says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from polymodal.core.errors import ConfigError, CorruptMediaError, DataError, SampleError
from polymodal.core.parts import Media
from polymodal.evaluation import metrics
from polymodal.evaluation.runner import evaluate
from polymodal.evaluation.scores import Report, rescore
from polymodal.evaluation.tasks import TASKS, MaskedWordsTask, MatchingTask, RetrievalTask
from polymodal.evaluation.words import change_fact, find_facts

COLOURS = ("red", "green", "blue", "black")
SHAPES = ("star", "cross", "circle")
GROUPS = {"colour": COLOURS, "shape": SHAPES}


def write_views(folder: Path, num: int = 60, as_names: bool = False) -> Path:
    """Pictures whose file names say what they show, and what their texts say."""
    lines = []
    for i in range(num):
        colour, shape = COLOURS[i % 4], SHAPES[i % 3]
        image, text = f"{colour}-{shape}-{i}.png", f"A {colour} {shape}, the {i}th."
        if as_names:
            content = [{"type": "image", "path": image}, {"type": "text", "text": "What is it?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
            lines.append({"id": f"v{i}", "messages": messages})
        else:
            lines.append({"id": f"v{i}", "views": {"image": image, "audio": f"{i}.wav", "text": text}})
    path = folder / "views.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


class Looker:
    """Reads the colour, and nothing else, from a picture's name; without a picture it believes every text."""

    def seen(self, sample):
        media = sample.media()
        assert len(media) <= 1, "a model is shown the medium and the text alone"
        if media and "corrupt" in media[0].name:
            raise CorruptMediaError(media[0].name, "is broken")
        return Path(media[0].name).name.split("-")[0] if media else None

    def match(self, samples):
        texts = [sample.views["text"].text for sample in samples]
        seen = [self.seen(sample) for sample in samples]
        pairs = zip(seen, texts, strict=True)
        return np.array([0.9 if colour is None or colour in text else 0.1 for colour, text in pairs])

    def fill(self, samples, hidden, head=""):
        words = []
        for sample, (start, end) in zip(samples, hidden, strict=True):
            is_colour = sample.views["text"].text[start:end].lower() in COLOURS
            words.append((self.seen(sample) or "red") if is_colour else "star")
        return words

    def embed(self, parts):
        # Of a picture, its shape; of a text, too: colours are left to the matching head.
        names = [Path(part.name).name if isinstance(part, Media) else part.text for part in parts]
        return np.array([np.eye(3)[next(k for k, s in enumerate(SHAPES) if s in name)] for name in names], np.float32)


def test_matching(tmp_path):
    task = MatchingTask(data=str(write_views(tmp_path)), groups=GROUPS, batch_size=7)
    stored = tmp_path / "predictions.jsonl"
    report = evaluate(Looker(), task, predictions=stored)
    assert [row.family for row in report.rows] == ["colour", "random", "shape"]
    colour, random, shape = report.rows
    assert colour.score.value == colour.metrics["AUC"] == colour.metrics["pairs"] == 1.0
    # A foil's colour differs; a foil's shape is not seen, and every text is believed.
    assert shape.score.value == shape.metrics["AUC"] == 0.5
    assert shape.metrics["pairs"] == 0.0, "a tie is no right order"
    assert 0.75 < random.score.value < 1.0, "a quarter of the other texts name the same colour"
    for row in (*report.rows, report.overall):
        assert row.controls["blind"].value == row.controls["majority"].value == 0.5
        assert abs(row.controls["shuffled"].value - 0.5) < 0.15
        assert set(row.controls) == {"blind", "shuffled", "majority"}
        assert row.metrics["AUC blind"] == 0.5
        assert row.score.n == (180 if row.family == "overall" else 60)
    assert rescore(stored) == report == Report.from_data(report.to_data())
    for line in stored.read_text().splitlines()[1:]:
        record = json.loads(line)
        own, foil = record["text"].split(), record["foil_text"].split()
        changed = [pair for pair in zip(own, foil, strict=True) if pair[0] != pair[1]]
        if record["family"] == "random":
            assert own[-1] != foil[-1]
        else:
            assert len(changed) == 1, "a minimal foil differs in one word"
            words = GROUPS[record["family"]]
            assert all(word.strip(",") in words for word in changed[0])


def test_matching_of_some_foils_and_conditions(tmp_path):
    data = str(write_views(tmp_path))
    task = MatchingTask(data=data, groups=GROUPS, foils=("random",), conditions=("shuffled",), limit=20)
    report = evaluate(Looker(), task)
    assert [row.family for row in report.rows] == ["random"]
    assert (report.overall.score.n, set(report.overall.controls)) == (20, {"shuffled"})
    names = write_views(tmp_path, as_names=True)
    assert evaluate(Looker(), MatchingTask(data=str(names), groups=GROUPS)).overall.score.n == 180
    with pytest.raises(DataError, match="no foil could be made of its 60 texts; expected some that hold a word of"):
        evaluate(Looker(), MatchingTask(data=data, groups={"size": ("small", "large")}, foils=("minimal",)))
    with pytest.raises(DataError, match="none of 60 samples has the views 'video' and 'text'"):
        evaluate(Looker(), MatchingTask(data=data, media="video"))


def test_a_foil_is_never_true(tmp_path):
    lines = [
        {"id": f"v{i}", "label": str(i % 2), "views": {"image": f"{i}.png", "text": f"text {i % 2} {i % 4 // 2}"}}
        for i in range(20)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    stored = tmp_path / "predictions.jsonl"

    class Sure:
        def match(self, samples):
            return np.full(len(samples), 0.5)

    report = evaluate(Sure(), MatchingTask(data=str(path), foils=("random",)), predictions=stored)
    records = [json.loads(line) for line in stored.read_text().splitlines()[1:]]
    assert all(record["text"].split()[1] != record["foil_text"].split()[1] for record in records)
    assert report.overall.score.value == report.overall.metrics["at 0.5"] == 0.5, "as sure of a foil as of a text"


def test_masked_words(tmp_path):
    task = MaskedWordsTask(data=str(write_views(tmp_path)), groups=GROUPS, batch_size=7)
    stored = tmp_path / "predictions.jsonl"
    done = []
    report = evaluate(Looker(), task, predictions=stored, progress=lambda *state: done.append(state))
    assert (report.use, [row.family for row in report.rows]) == ("masked_words", ["colour", "shape"])
    colour, shape = report.rows
    assert colour.score.value == 1.0
    assert colour.controls["blind"].value == colour.controls["majority"].value == 0.25
    assert colour.controls["shuffled"].value < 0.5
    assert shape.score.value == shape.controls["blind"].value == pytest.approx(1 / 3)
    assert rescore(stored) == report
    record = json.loads(stored.read_text().splitlines()[1])
    assert record["question"].count("[...]") == 1 and record["answer"] not in record["question"]
    assert {state[0] for state in done} == {"full", "blind", "shuffled"}
    assert evaluate(Looker(), task.model_copy(update={"limit": 5})).overall.score.n == 10
    with pytest.raises(DataError, match="its texts hold no word that could be hidden"):
        evaluate(Looker(), MaskedWordsTask(data=task.data, groups={"size": ("small", "large")}))


def test_what_cannot_be_asked_is_named_and_counts_as_wrong(tmp_path):
    path = write_views(tmp_path)
    path.write_text(path.read_text().replace("red-star-0.png", "corrupt-0.png"))
    for task in (MaskedWordsTask(data=str(path), groups=GROUPS), MatchingTask(data=str(path), groups=GROUPS)):
        report = evaluate(Looker(), task.model_copy(update={"conditions": ()}))
        assert len({error.partition(":")[2] for error in report.errors}) == 1
        assert all("v0@" in error and "corrupt-0.png: is broken" in error for error in report.errors)
        (colour,) = (row for row in report.rows if row.family == "colour")
        assert colour.score.value == pytest.approx(59 / 60)


def test_a_model_that_cannot_do_it_at_all_is_no_wrong_answer(tmp_path):
    class Blunt:
        def match(self, samples):
            raise ConfigError("the model has no head of the kind 'matching'")

        def fill(self, samples, hidden, head=""):
            return ["red"]

    data = str(write_views(tmp_path))
    with pytest.raises(ConfigError, match="no head of the kind 'matching'"):
        evaluate(Blunt(), MatchingTask(data=data, groups=GROUPS))
    with pytest.raises(DataError, match="the model gave 1 words for 32 hidden ones"):
        evaluate(Blunt(), MaskedWordsTask(data=data, groups=GROUPS))

    class Odd:
        def match(self, samples):
            return np.full(len(samples), 1.5)

    with pytest.raises(DataError, match="expected chances"):
        evaluate(Odd(), MatchingTask(data=data, groups=GROUPS))


def test_reranking(tmp_path):
    # A third of the texts shares a picture's shape, which is all that the space tells; the head tells colours.
    task = RetrievalTask(data=str(write_views(tmp_path, 12)), query="image", target="text", ks=(1, 4), rerank=4)
    stored = tmp_path / "predictions.jsonl"
    row = evaluate(Looker(), task, predictions=stored).overall
    assert (row.metrics["R@1 before"], row.metrics["R@4 before"]) == (0.0, 1.0)
    assert (row.score.value, row.metrics["R@1"], row.metrics["R@4"]) == (1.0, 1.0, 1.0)
    assert rescore(stored).overall == row
    # What stands beyond the reranked ones keeps its place.
    few = evaluate(Looker(), task.model_copy(update={"rerank": 1})).overall
    assert few.metrics["R@4"] == few.metrics["R@4 before"]
    with pytest.raises(ConfigError, match="a matching head compares two views, found 'image' on both sides"):
        TASKS.parse({"use": "retrieval", "data": "x", "query": "image", "target": "image", "rerank": 3})


def test_facts_are_found_where_they_stand_once():
    groups = {"place": ("at the top", "at the top left"), "colour": ("red", "blue")}
    text = "Red: at the top left a star and a blue star, at the top a blue cross, reddish."
    found = find_facts(text, groups)
    assert [(fact.group, fact.word) for fact in found] == [
        ("colour", "red"), ("place", "at the top left"), ("place", "at the top"),
    ]  # fmt: skip
    assert [text[fact.start : fact.end] for fact in found] == ["Red", "at the top left", "at the top"]
    rng = np.random.default_rng(0)
    assert change_fact(text, found[0], ("red", "blue", "green"), rng) == text.replace("Red", "Green")
    assert change_fact(text, found[0], ("red", "blue"), rng) is None


def test_task_configs():
    parsed = TASKS.parse({"use": "matching", "data": "x", "groups": GROUPS})
    assert TASKS.parse(parsed.to_data()) == parsed
    assert "colour" in MaskedWordsTask(data="x").groups
    for wrong, message in (
        ({"use": "matching", "groups": {"colour": ["red"]}}, "expected two different words or more"),
        ({"use": "matching", "groups": {"random": ["a", "b"]}}, "has a meaning of its own"),
        ({"use": "matching", "foils": []}, "expected random, minimal, or both once"),
        ({"use": "masked_words", "conditions": ["bling"]}, "conditions"),
    ):
        with pytest.raises(ConfigError, match=message):
            TASKS.parse({"data": "x", **wrong})


def test_a_head_that_says_no_too_often_is_judged_by_its_own_threshold(tmp_path):
    class Doubting(Looker):
        def match(self, samples):
            return super().match(samples) / 10

    task = MatchingTask(data=str(write_views(tmp_path)), groups=GROUPS)
    doubting, sure = ({row.family: row for row in evaluate(model, task).rows} for model in (Doubting(), Looker()))
    assert doubting["colour"].score.value == 1.0 and doubting["colour"].metrics["at 0.5"] == 0.5
    assert sure["colour"].metrics["at 0.5"] == 1.0
    assert doubting["random"].score == sure["random"].score and doubting["random"].controls == sure["random"].controls


def test_best_threshold():
    rng = np.random.default_rng(0)
    for _ in range(20):
        own, foil = rng.integers(0, 6, 9) / 5, rng.integers(0, 6, 7) / 5
        found = metrics.best_threshold(own, foil)
        tried = [(own >= at).mean() + (foil < at).mean() for at in np.linspace(-0.1, 1.1, 200)]
        assert (own >= found).mean() + (foil < found).mean() == pytest.approx(max(tried))
    assert metrics.best_threshold(np.array([0.9]), np.array([0.1])) == 0.5
    assert metrics.best_threshold(np.array([0.3]), np.array([0.3])) == 0.3, "yes to both, as to either"
    assert metrics.best_threshold(np.array([]), np.array([0.3])) == 0.5


def test_roc_auc():
    rng = np.random.default_rng(0)
    own, foil = rng.integers(0, 6, 40), rng.integers(0, 5, 30)
    counted = np.mean([(a > b) + 0.5 * (a == b) for a in own for b in foil])
    assert metrics.roc_auc(own, foil) == pytest.approx(counted)
    assert metrics.roc_auc([1.0], [0.0]) == 1.0 and metrics.roc_auc([0.0], [1.0]) == 0.0
    with pytest.raises(DataError, match="found 0 positives and 1 negatives"):
        metrics.roc_auc([], [1.0])


def test_a_text_in_another_form_is_refused(tmp_path):
    path = tmp_path / "turns.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps({"id": "a", "messages": turns}) + "\n")
    with pytest.raises(SampleError, match="0 media, expected a question about one medium and its answer"):
        evaluate(Looker(), MatchingTask(data=str(path)))
