"""Questions about a scene, in families; the wording of a question says nothing about its answer.

Every argument of a wording (a shape, a colour, which of two is named first) is drawn before the answer, or so that each
answer goes with it equally often; ``latent`` explains how.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from polymodal.data.scenes.latent import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    MOTIONS,
    NUMBERS,
    RELATIONS,
    SEEN,
    SHAPES,
    SIZES,
    SOLIDS,
    SOUNDS,
    Scene,
    Thing,
)

Pick = Callable[[Scene, random.Random], "tuple[tuple[str, ...], str] | None"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question: the media it needs, in order, its text and its answer of one word."""

    family: str
    media: tuple[str, ...]
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of question.

    Args:
        media: the modalities that it needs together.
        answers: all answers, each equally likely for every wording in which it can stand.
        pick: gives (wordings, answer) for a scene, or None where the family cannot be asked.
    """

    media: tuple[str, ...]
    answers: tuple[str, ...]
    pick: Pick


def _attribute(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    thing = scene.things[0]
    if scene.stratum("asks shape", 2) and scene.colours.count(thing.colour) == 1:
        c = thing.colour
        return (
            f"What shape is the {c} object?",
            f"Which shape does the {c} object have?",
            f"The {c} object: what shape is it?",
        ), thing.shape
    return colour_wordings(thing.shape), thing.colour


def colour_wordings(s: str) -> tuple[str, ...]:
    """The ways to ask for the colour of ``s``."""
    return f"What colour is the {s}?", f"Which colour does the {s} have?", f"The {s}: what colour is it?"


def _count(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    colour = scene.counted_colour
    if colour is None:
        texts = ("How many objects are there?", "How many objects can you see?", "Count the objects.")
        return texts, NUMBERS[len(scene.things)]
    c = colour
    texts = (f"How many {c} objects are there?", f"How many objects are {c}?", f"Count the {c} objects.")
    return texts, NUMBERS[scene.colours.count(c)]


def _existence(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    is_there = bool(scene.stratum("exists", 2))
    thing = scene.things[0]
    colour, shape = (thing.colour, thing.shape) if is_there else near_miss(scene, thing, words)
    return existence_wordings(colour, shape), "yes" if is_there else "no"


def existence_wordings(colour: str, shape: str) -> tuple[str, ...]:
    """The ways to ask whether there is a thing of a colour and a shape."""
    return (
        f"Is there a {colour} {shape}?",
        f"Can you see a {colour} {shape}?",
        f"Does the picture show a {colour} {shape}?",
    )


def near_miss(scene: Scene, thing: Thing, words: random.Random) -> tuple[str, str]:
    """A pair that differs from a thing of the scene in colour or in shape, and is not in the scene.

    Held-out pairs are never named outside ``novel``: "no" would be learnt by heart for them.
    """
    there = {(t.colour, t.shape) for t in scene.things}
    allowed = (*SEEN, *HELD_OUT) if scene.split == "novel" else SEEN
    same_shape = [(c, s) for c, s in allowed if s == thing.shape and (c, s) not in there]
    same_colour = [(c, s) for c, s in allowed if c == thing.colour and (c, s) not in there]
    if same_colour and words.random() < 0.5:
        return words.choice(same_colour)
    return words.choice(same_shape)


def _spatial(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str] | None:
    if scene.relation is None:
        return None
    first, second, where = scene.relation
    return spatial_wordings(scene.things[first].shape, scene.things[second].shape), where


def spatial_wordings(a: str, b: str) -> tuple[str, ...]:
    """The ways to ask where ``a`` is, seen from ``b``."""
    return (
        f"Where is the {a} relative to the {b}?",
        f"On which side of the {b} is the {a}?",
        f"Seen from the {b}, where is the {a}?",
    )


def _comparison(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str] | None:
    if scene.compared is None:
        return None
    one, two = (scene.things[i] for i in scene.compared)
    return compared(one, two, words)


def compared(one: Thing, two: Thing, words: random.Random) -> tuple[tuple[str, ...], str]:
    """The ways to ask which of two things of different sizes is larger, or smaller, and the answer."""
    a, b = one.shape, two.shape
    larger, smaller = (a, b) if one.size == "large" else (b, a)
    if words.random() < 0.5:
        texts = (
            f"Which is larger, the {a} or the {b}?",
            f"The {a} or the {b}: which is larger?",
            f"Which is bigger, the {a} or the {b}?",
        )
        return texts, larger
    return (f"Which is smaller, the {a} or the {b}?", f"The {a} or the {b}: which is smaller?"), smaller


def _sound(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    return ("Which sound is this?", "What do you hear?", "What kind of sound is it?"), SOUNDS[scene.sounding.shape]


def _sound_count(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    texts = ("How many times do you hear the sound?", "How often does it sound?", "How many sounds are there?")
    return texts, NUMBERS[scene.sound_count]


def _direction(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    return direction_wordings(scene.things[0].shape), scene.moves[0]


def direction_wordings(s: str) -> tuple[str, ...]:
    """The ways to ask which way ``s`` moves."""
    return f"Which way does the {s} move?", f"In which direction does the {s} move?", f"The {s} moves: which way?"


def _order(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str] | None:
    if len(scene.blinks) < 2:
        return None
    first, second = (scene.things[i].shape for i in scene.blinks)
    a, b = (first, second) if scene.stratum("named first", 2) else (second, first)
    return order_wordings(a, b), first


def order_wordings(a: str, b: str) -> tuple[str, ...]:
    """The ways to ask which of two things blinks first."""
    return (
        f"Which blinks first, the {a} or the {b}?",
        f"The {a} or the {b}: which blinks first?",
        f"Which one blinks earlier, the {a} or the {b}?",
    )


def _solid(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    return ("Which solid is this?", "What shape do the points form?", "What solid do the points show?"), scene.solid[0]


def _solid_size(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    texts = ("Is the solid small or large?", "What size is the solid?", "How big is the solid, small or large?")
    return texts, scene.solid[1]


def _motion(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str]:
    return ("How does the device move?", "Which motion is this?", "What motion did the sensor record?"), scene.motion


def _sound_colour(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str] | None:
    """Asked where the picture holds three or four things, all of other colours: without the sound it says little."""
    if len(scene.things) < 3 or len(set(scene.colours)) < len(scene.things):
        return None
    return (
        "What colour is the object that you hear?",
        "Which colour does the object that sounds have?",
        "You hear one of the objects: what colour is it?",
    ), scene.sounding.colour


def _sound_direction(scene: Scene, words: random.Random) -> tuple[tuple[str, ...], str] | None:
    """Asked where two things move, in different directions."""
    if len(scene.things) < 2:
        return None
    return (
        "Which way does the object that you hear move?",
        "In which direction does the object that sounds move?",
        "You hear one of the objects: which way does it move?",
    ), scene.moves[0]


FAMILIES: dict[str, Family] = {
    "attribute": Family(("image",), (*COLOURS, *SHAPES), _attribute),
    "count": Family(("image",), NUMBERS, _count),
    "existence": Family(("image",), ("yes", "no"), _existence),
    "spatial": Family(("image",), RELATIONS, _spatial),
    "comparison": Family(("image",), SHAPES, _comparison),
    "sound": Family(("audio",), tuple(SOUNDS.values()), _sound),
    "sound_count": Family(("audio",), NUMBERS[1:], _sound_count),
    "direction": Family(("video",), DIRECTIONS, _direction),
    "order": Family(("video",), SHAPES, _order),
    "solid": Family(("points",), SOLIDS, _solid),
    "solid_size": Family(("points",), SIZES, _solid_size),
    "motion": Family(("sensor",), MOTIONS, _motion),
    "sound_colour": Family(("image", "audio"), tuple(COLOURS), _sound_colour),
    "sound_direction": Family(("video", "audio"), DIRECTIONS, _sound_direction),
}
"""Every family by name."""


def questions(scene: Scene, families: tuple[str, ...], words: random.Random) -> list[Question]:
    """One question of each family that the scene allows."""
    result = []
    for name in families:
        family = FAMILIES[name]
        picked = family.pick(scene, words)
        if picked is not None:
            result.append(Question(name, family.media, words.choice(picked[0]), picked[1]))
    return result
