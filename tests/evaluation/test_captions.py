"""Captions beside their references: facts, BLEU and CIDEr against figures worked out by hand, and the controls."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError, CorruptMediaError, DataError
from polymodal.evaluation.caption_scores import bleu, cider, count_right, fact_pattern, read_things, right_facts
from polymodal.evaluation.runner import evaluate
from polymodal.evaluation.scores import Report, rescore
from polymodal.evaluation.tasks import TASKS

FACTS = r"(?P<place>left|right) a (?P<colour>red|blue) (?P<shape>star|cross)"
GROUPS = ("place", "colour", "shape")


def thing(text: str) -> dict[str, str]:
    return dict(zip(GROUPS, text.split(), strict=True))


def test_facts_are_read_thing_by_thing() -> None:
    told = "Left a RED star and right a blue cross; a red star."
    assert read_things(told, re.compile(FACTS)) == [thing("left red star"), thing("right blue cross")]


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [
        (["left red star"], ["left red cross"], [[True, True, False]]),
        # The place says which thing is meant: everything of a thing at another place is wrong.
        (["right red star"], ["left red star"], [[False, False, False]]),
        # What equals a thing is its partner, whatever stands before it.
        (["left blue star", "left red cross"], ["left red cross", "left blue star"], [[True] * 3, [True] * 3]),
        # Of two at one place each is a partner once.
        (["left red star"], ["left red star", "left red star"], [[True] * 3, [False] * 3]),
        # What is said beyond the number of things is wrong.
        (["left red star", "right red star"], ["left red star"], [[True] * 3, [False] * 3]),
        # Instead of the other one: one thing is missing, and nothing is counted twice.
        (["left red star", "right red star"], ["left red star", "left blue cross"], [[True] * 3, [False] * 3]),
    ],
)
def test_facts_are_right_where_the_first_one_is(said: list[str], true: list[str], right: list[list[bool]]) -> None:
    found = right_facts([thing(text) for text in said], [thing(text) for text in true], GROUPS)
    assert [list(row.values()) for row in found] == right


def test_whole_things_count_overall() -> None:
    found = count_right(["left a red star", "nothing"], ["left a red cross", "right a blue star"], re.compile(FACTS))
    assert found == {
        "overall": [False, False], "place": [True, False], "colour": [True, False], "shape": [False, False]
    }  # fmt: skip
    with pytest.raises(DataError, match="matches no reference, such as 'a dog'"):
        count_right(["a dog"], ["a dog"], re.compile(FACTS))


def test_bleu_by_hand() -> None:
    # Of one to four words 4 of 6, 3 of 5, 2 of 4 and 1 of 3 are there; six words stand against seven.
    said, true = "there is a big red cat", "there is a big dog today really"
    assert bleu([true], [true]) == 1.0
    expected = math.exp(1 - 7 / 6) * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu([said], [true]) == pytest.approx(expected)
    assert bleu(["no word fits"], [true]) == 0.0
    # Clipped: a word counts as often as the reference has it. Nothing of the order two fits.
    assert bleu(["is is is is"], [true]) == 0.0


def test_cider_by_hand() -> None:
    true = ["a red star here", "a blue star there"]
    assert cider(true, true) == pytest.approx(10.0)
    assert cider(["nothing of it", "nor of that"], true) == 0.0
    # "a" and "star" stand in every reference and weigh nothing. Of the one-word grams "red" is shared, "there" is not:
    # both vectors have two entries of ln 2, so that the cosine is 1/2; of the two-word grams "a red" and "red star" of
    # three are; of the three-word grams "a red star" of two; the four-word ones differ.
    mixed = "a red star there"
    expected = 10 * (1 / 2 + 2 / 3 + 1 / 2 + 0) / 4
    assert cider([mixed, "zz"], true) == pytest.approx(expected / 2)
    # Four words where one belongs: the penalty of sigma 6.
    long = cider(["a red star here and so on and on", "zz"], true)
    assert long < cider(["a red star here", "zz"], true) * math.exp(-(5**2) / 72) + 1e-9


class Teller:
    """Tells what the name of a picture says, wrongly for blue ones; guesses without one."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, int]] = []

    def caption(self, media: Sequence[object], request: str, *, max_new_tokens: int) -> list[str]:
        self.asked.append((len(media), request, max_new_tokens))
        names = [None if medium is None else Path(medium.name).stem for medium in media]
        if "broken" in names:
            raise CorruptMediaError("broken", "is broken")
        return [
            "left a red star" if name is None else f"{name.split('-')[0]} a red {name.split('-')[2]}" for name in names
        ]


@pytest.fixture
def views(tmp_path: Path) -> Path:
    names = ["left-red-star", "right-blue-cross", "left-red-cross", "left-red-star", "broken"]
    lines = []
    for index, name in enumerate(names):
        text = name.replace("-", " a ", 1).replace("-", " ") if name != "broken" else "right a blue star"
        views = {"image": {"path": f"{name}.png"}, "text": text}
        lines.append({"id": f"v{index}", "views": views})
    lines.append({"id": "sound", "views": {"audio": {"path": "a.wav"}, "text": "left a red star"}})
    path = tmp_path / "views.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def task(data: Path, **changes: object) -> Config:
    return TASKS.parse({"use": "captions", "data": str(data), "facts": FACTS, **changes}, "task")


def test_a_report_has_each_fact_beside_its_controls(views: Path, tmp_path: Path) -> None:
    teller = Teller()
    stored = tmp_path / "p.jsonl"
    report = evaluate(teller, task(views, max_new_tokens=9), predictions=stored)  # type: ignore[arg-type]
    by_fact = {row.family: row.score.value for row in report.rows}
    assert by_fact == {"place": 0.8, "colour": 0.6, "shape": 0.8}
    assert report.overall.score.value == 0.6
    controls = {name: score.value for name, score in report.overall.controls.items()}
    assert controls["blind"] == 0.4 and controls["majority"] == 0.4
    assert controls["shuffled"] <= 0.4
    assert report.overall.metrics["CIDEr"] > report.overall.metrics["CIDEr blind"]
    assert report.overall.metrics["BLEU-4"] > report.overall.metrics["BLEU-4 blind"]
    assert len(report.errors) == 1 and report.errors[0].startswith("v4: ")
    assert {request for _, request, _ in teller.asked} == {"Describe this image."}
    assert {length for *_, length in teller.asked} == {9}
    assert rescore(stored) == report
    assert Report.from_data(report.to_data()) == report


def test_conditions_and_limits(views: Path) -> None:
    teller = Teller()
    report = evaluate(teller, task(views, conditions=[], limit=2, request="?"))  # type: ignore[arg-type]
    assert report.overall.controls == {} and report.overall.score.n == 2
    assert {request for _, request, _ in teller.asked} == {"?"}


def test_a_model_that_cannot_write_says_so_once(views: Path) -> None:
    class Mute:
        def caption(self, *_: object, **__: object) -> list[str]:
            raise ConfigError("writes nothing")

    with pytest.raises(ConfigError, match="writes nothing"):
        evaluate(Mute(), task(views))  # type: ignore[arg-type]


def test_mistakes_are_named(views: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no group, expected some, such as \(\?P<colour>red\|blue\)"):
        task(views, facts="red|blue")
    with pytest.raises(ConfigError, match="is no regular expression"):
        task(views, facts="(")
    with pytest.raises(DataError, match="found no sample with the views 'video' and 'text', expected some"):
        evaluate(Teller(), task(views, media="video"))  # type: ignore[arg-type]

    class Short(Teller):
        def caption(self, *_: object, **__: object) -> list[str]:
            return []

    with pytest.raises(DataError, match="gave 0 captions of 5 media, expected as many"):
        evaluate(Short(), task(views))  # type: ignore[arg-type]
    assert fact_pattern(FACTS).groupindex["shape"] == 3
