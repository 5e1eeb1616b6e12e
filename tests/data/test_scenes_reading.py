"""Lists of things in words, each with one question: the list decides the answer, and nothing else does."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from polymodal.data.scenes import HELD_OUT, make_scene
from polymodal.data.scenes.captions import cell
from polymodal.data.scenes.corpus import reading_samples
from polymodal.data.scenes.latent import COLOURS, NUMBERS, SHAPES, SIZES
from polymodal.data.scenes.reading import READ_FAMILIES, reading

PLACES = {
    f"{row} {column}".strip() or "centre": (x, y)
    for y, row in enumerate(("top", "", "bottom"))
    for x, column in enumerate(("left", "", "right"))
}

Line = tuple[str, str, str]


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    return [line for index in range(800) for line in reading(0, "train", index)]


def listed(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """What a list tells of each shape, and what follows it."""
    told, rest = text.split(". ", 1)
    things = {}
    for phrase in told.split(", "):
        *aspects, shape = phrase.split()
        place = " ".join(word for word in aspects if word not in (*COLOURS, *SIZES))
        things[shape] = {
            "place": place,
            "colour": next((word for word in aspects if word in COLOURS), ""),
            "size": next((word for word in aspects if word in SIZES), ""),
        }
    return things, rest


def test_every_answer_follows_from_the_list(lines: list[Line]) -> None:
    for kind, text, answer in lines:
        if kind != "caption":
            things, question = listed(text)
            assert _answer(kind, things, question) == answer, text


def _answer(kind: str, things: dict[str, dict[str, str]], question: str) -> str:
    shapes = [word for word in re.findall(r"\w+", question) if word in SHAPES]
    colours = [word for word in re.findall(r"\w+", question) if word in COLOURS]
    if kind == "attribute" and shapes:
        return things[shapes[0]]["colour"]
    if kind == "attribute":
        (shape,) = (shape for shape, told in things.items() if told["colour"] == colours[0])
        return shape
    if kind == "count":
        return NUMBERS[sum(not colours or told["colour"] == colours[0] for told in things.values())]
    if kind == "existence":
        return "yes" if things.get(shapes[0], {}).get("colour") == colours[0] else "no"
    if kind == "comparison":
        wanted = "small" if "smaller" in question else "large"
        (shape,) = (shape for shape in shapes if things[shape]["size"] == wanted)
        return str(shape)
    first, second = shapes if question.startswith("Where") else shapes[::-1]
    (x, y), (other_x, other_y) = (PLACES[things[shape]["place"]] for shape in (first, second))
    if abs(x - other_x) > abs(y - other_y):
        return "left" if x < other_x else "right"
    return "above" if y < other_y else "below"


def test_answers_are_balanced_and_every_family_is_asked(lines: list[Line]) -> None:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in (*READ_FAMILIES, "caption")}
    for kind, _, answer in lines:
        counts[kind][answer] += 1
    assert all(sum(counts[kind].values()) > 790 for kind in counts)
    for kind, most in (("existence", 0.55), ("spatial", 0.3), ("comparison", 0.25)):
        assert max(counts[kind].values()) < most * sum(counts[kind].values())


def test_what_is_not_asked_for_is_mostly_left_out(lines: list[Line]) -> None:
    asked = [next(iter(listed(text)[0].values())) for kind, text, _ in lines if kind == "attribute"]
    assert all(told["colour"] for told in asked)
    for aspect in ("place", "size"):
        assert 0.2 < sum(bool(told[aspect]) for told in asked) / len(asked) < 0.3


def test_held_out_pairs_are_not_read_of_before_novel(lines: list[Line]) -> None:
    held_out = {f"{colour} {shape}" for colour, shape in HELD_OUT}
    assert not any(pair in text + answer for _, text, answer in lines for pair in held_out)
    assert all(any(pair in text for pair in held_out) for _, text, _ in reading(0, "novel", 0) if "Describe" in text)


def test_lines_depend_on_seed_split_and_index_alone() -> None:
    assert list(reading(1, "train", 5)) == list(reading(1, "train", 5)) != list(reading(1, "val", 5))
    names = [sample.id for _, sample in reading_samples(1, "train", 5)]
    assert len(set(names)) == len(names) and names[0] == "train-reading-5-0"


def test_the_cell_of_a_thing_is_where_its_caption_says() -> None:
    for index in range(50):
        for thing in make_scene(0, "train", index).things:
            assert cell(thing) == tuple(min(2, int(3 * value / 64)) for value in thing.xy)
