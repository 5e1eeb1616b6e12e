"""Short lists of things in words, each with one question or a request: what teaches a language model to look things up.

A frozen language model can be asked no more of a picture than it reads in words. A caption is long and names one
thing after the other; here a few words stand for a thing, one question follows, and what the question does not need is
mostly left out, so that little stands beside what is looked up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from polymodal.data.scenes.captions import REQUESTS, caption, cell, place
from polymodal.data.scenes.latent import Scene, Thing, make_scene
from polymodal.data.scenes.questions import questions

READ_FAMILIES = {
    "attribute": ("colour",),
    "count": ("colour",),
    "existence": ("colour",),
    "spatial": ("place",),
    "comparison": ("size",),
}
"""The families of questions about pictures, and what a list has to tell of each thing for one."""

_ASPECTS = ("place", "size", "colour")
_OTHER_ASPECTS = 0.25
_ALL = tuple(READ_FAMILIES)
_LOOKUPS = ("attribute", "spatial", "comparison")
_ASKED = (_ALL, _LOOKUPS, _LOOKUPS)
"""The families that are asked of each scene of an index: counts and existence are learnt from fewer."""


def reading(seed: int, split: str, index: int) -> Iterator[tuple[str, str, str]]:
    """(kind, what the user says, answer) for every line of an index: questions, and descriptions of what is listed.

    The scenes are those behind the text of the split, three for an index; their questions are balanced like all others.
    """
    for number, families in enumerate(_ASKED):
        scene = make_scene(seed, f"{split}-text", len(_ASKED) * index + number)
        words = scene.words(5)
        for question in questions(scene, families, words):
            if question.family == "spatial" and not _is_told(scene):
                continue
            listed = _listed(scene, READ_FAMILIES[question.family], words)
            yield question.family, f"{listed} {question.text}", question.answer
        if families == _ALL:
            listed = _listed(scene, _ASPECTS, words)
            yield "caption", f"{listed} {words.choice(REQUESTS['image'])}", caption(scene, "image", words)


def _listed(scene: Scene, needed: tuple[str, ...], words: random.Random) -> str:
    """The things in random order: before each name what is needed, and any other aspect a quarter of the time."""
    told = [aspect for aspect in _ASPECTS if aspect in needed or words.random() < _OTHER_ASPECTS]
    things = words.sample(scene.things, len(scene.things))
    return ", ".join(" ".join((*(_aspect(thing, aspect) for aspect in told), thing.shape)) for thing in things) + "."


def _aspect(thing: Thing, aspect: str) -> str:
    if aspect == "place":
        return place(thing).split(" the ")[1]
    return thing.size if aspect == "size" else thing.colour


def _is_told(scene: Scene) -> bool:
    """Whether the asked relation follows from the thirds of the picture that its two things stand in.

    Worked example: 13 px above and 5 px to the left, both in the upper third, is told as "left" and "top": not above.
    """
    if scene.relation is None:
        return False
    first, second, where = scene.relation
    (column, row), (other_column, other_row) = cell(scene.things[first]), cell(scene.things[second])
    dx, dy = column - other_column, row - other_row
    along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[where]
    return along > abs(across)
