"""One short question at a time about the things of a picture or a video, by their names.

In a long conversation the one token that holds the answer is one among many, and a small decoder is slow to find it;
what it is asked here stands alone (``docs/log.md``). There are more of these than ``questions`` has, and what is asked
most is what takes longest to learn; answers are balanced where a guess could do.
"""

from __future__ import annotations

import random
from itertools import permutations

from polymodal.data.scenes.captions import place
from polymodal.data.scenes.details import blinking, moving
from polymodal.data.scenes.latent import RELATIONS, Scene
from polymodal.data.scenes.layout import holds
from polymodal.data.scenes.questions import (
    colour_wordings,
    compared,
    direction_wordings,
    existence_wordings,
    near_miss,
    order_wordings,
    spatial_wordings,
)

DRILL_MEDIA = ("image", "video")
"""The media that :func:`drills` asks about."""

_MAX_FACTS_ASKED = 3
_MAX_RELATIONS_ASKED = 6
_MAX_SIZES_ASKED = 2
_MAX_EVENTS = 6

Asked = tuple[tuple[str, ...], str]
"""The wordings of a question, and its answer."""


def drills(scene: Scene, medium: str, words: random.Random) -> list[tuple[str, str]]:
    """Short questions about the things of a medium by their names, and the answers, in random order.

    Args:
        scene: the scene.
        medium: one of :data:`DRILL_MEDIA`.
        words: the source of choices.
    """
    told = _picture(scene, words) if medium == "image" else _video(scene, words)
    asked = [(words.choice(texts), answer) for texts, answer in told]
    return words.sample(asked, len(asked))


def _picture(scene: Scene, words: random.Random) -> list[Asked]:
    """Where each thing is, up to three of the other facts, six relations, two sizes, one pair there and one not."""
    places: list[Asked] = []
    others: list[Asked] = []
    for thing in scene.things:
        name = thing.shape
        places.append(((f"Where is the {name}?", f"In which part is the {name}?"), place(thing)))
        others.append(((f"How large is the {name}?", f"What size is the {name}?"), thing.size))
        others.append((colour_wordings(name), thing.colour))
    pairs = list(permutations(scene.things, 2))
    relations: list[Asked] = [
        (spatial_wordings(a.shape, b.shape), where) for a, b in pairs for where in RELATIONS if holds(a.xy, b.xy, where)
    ]
    sizes = [compared(a, b, words) for a, b in pairs if a.size != b.size]
    thing = words.choice(scene.things)
    return [
        *places,
        *_some(others, _MAX_FACTS_ASKED, words),
        *_some(relations, _MAX_RELATIONS_ASKED, words),
        *_some(sizes, _MAX_SIZES_ASKED, words),
        (existence_wordings(thing.colour, thing.shape), "yes"),
        (existence_wordings(*near_miss(scene, thing, words)), "no"),
    ]


def _video(scene: Scene, words: random.Random) -> list[Asked]:
    """Up to six facts of single things, and which of two blinks first, asked both ways."""
    one: list[Asked] = []
    for i, thing in enumerate(scene.things):
        name, move = thing.shape, scene.moves[i]
        one.append(((f"What does the {name} do?", f"How does the {name} move?"), moving(move)))
        one.append(((f"When does the {name} blink?", f"Does the {name} blink?"), blinking(scene, i)))
        one.append((colour_wordings(name), thing.colour))
        if move:
            one.append((direction_wordings(name), move))
    told = _some(one, _MAX_EVENTS, words)
    if len(scene.blinks) > 1:
        first, second = (scene.things[i].shape for i in scene.blinks)
        told += [(order_wordings(first, second), first), (order_wordings(second, first), first)]
    return told


def _some(asked: list[Asked], most: int, words: random.Random) -> list[Asked]:
    return words.sample(asked, min(most, len(asked)))
