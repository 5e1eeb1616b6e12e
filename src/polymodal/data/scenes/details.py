"""What is true of things by their names, as sentences and as short questions: the names first, then what is looked up.

A caption goes through the places of a picture and says what stands there. Questions go the other way, from a name to
a place, a size or a direction; these texts teach that way densely, with several facts about one medium.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import permutations

from polymodal.data.scenes.captions import and_list, place
from polymodal.data.scenes.latent import RELATIONS, Scene
from polymodal.data.scenes.layout import holds
from polymodal.data.scenes.questions import spatial_wordings

DETAIL_REQUESTS = {
    ("image",): ("Describe every object.", "Go through the objects one by one.", "Tell me about each object."),
    ("video",): ("Describe every object.", "Go through the objects one by one.", "Tell me about each object."),
    ("audio", "image"): ("Describe the object that you hear.", "Tell me about the object that sounds."),
    ("audio", "video"): ("Describe the object that you hear.", "Tell me about the object that sounds."),
}
"""Per set of media, what a user says to have things described by name."""

LOOKUP_MEDIA = ("image", "video")
"""The media whose things :func:`lookups` asks about."""

_MAX_RELATIONS = 4
_MAX_LOOKUPS = 5
_MAX_RELATIONS_ASKED = 3
_ORDINALS = ("first", "second")


def details(scene: Scene, media: tuple[str, ...], words: random.Random) -> str:
    """The sentences about the things that a set of media shows; ``words`` chooses their order.

    Args:
        scene: the scene.
        media: a key of :data:`DETAIL_REQUESTS`.
        words: the source of choices.
    """
    return _DETAILS[media](scene, words)


def lookups(scene: Scene, medium: str, words: random.Random) -> list[tuple[str, str]]:
    """Short questions about the things of a medium by their names, and the answers, in random order.

    Args:
        scene: the scene.
        medium: one of :data:`LOOKUP_MEDIA`.
        words: the source of choices.
    """
    asked = _picture_lookups(scene, words) if medium == "image" else _video_lookups(scene, words)
    return words.sample(asked, len(asked))


def _picture_lookups(scene: Scene, words: random.Random) -> list[tuple[str, str]]:
    """Where up to five things are or how large, and where up to three are seen from others."""
    one = []
    for thing in scene.things:
        name = thing.shape
        one.append((words.choice((f"Where is the {name}?", f"In which part is the {name}?")), place(thing)))
        one.append((words.choice((f"How large is the {name}?", f"What size is the {name}?")), thing.size))
    two = [
        (words.choice(spatial_wordings(a.shape, b.shape)), where)
        for a, b in permutations(scene.things, 2)
        for where in RELATIONS
        if holds(a.xy, b.xy, where)
    ]
    return words.sample(one, min(_MAX_LOOKUPS, len(one))) + words.sample(two, min(_MAX_RELATIONS_ASKED, len(two)))


def _video_lookups(scene: Scene, words: random.Random) -> list[tuple[str, str]]:
    """What up to five things do, and when they blink."""
    asked = []
    for i, thing in enumerate(scene.things):
        name, move = thing.shape, scene.moves[i]
        asked.append((words.choice((f"What does the {name} do?", f"How does the {name} move?")), moving(move)))
        asked.append((words.choice((f"When does the {name} blink?", f"Does the {name} blink?")), blinking(scene, i)))
    return words.sample(asked, min(_MAX_LOOKUPS, len(asked)))


def moving(move: str) -> str:
    """What a thing does, in words."""
    return f"moves {move}" if move else "stays"


def blinking(scene: Scene, index: int) -> str:
    """When a thing blinks: ``never``, ``once`` where it is the only one, ``first`` or ``second``."""
    if index not in scene.blinks:
        return "never"
    return "once" if len(scene.blinks) == 1 else _ORDINALS[scene.blinks.index(index)]


def _in_picture(scene: Scene, index: int) -> str:
    thing = scene.things[index]
    return f"is {thing.size}, {thing.colour} and {place(thing)}"


def _in_video(scene: Scene, index: int) -> str:
    told = [f"is {scene.things[index].colour}", moving(scene.moves[index])]
    if index in scene.blinks:
        told.append("blinks" if len(scene.blinks) == 1 else f"blinks {_ORDINALS[scene.blinks.index(index)]}")
    return and_list(told)


def _each(told: Callable[[Scene, int], str]) -> Callable[[Scene, random.Random], str]:
    def sentences(scene: Scene, words: random.Random) -> str:
        order = words.sample(range(len(scene.things)), len(scene.things))
        return " ".join(f"The {scene.things[i].shape} {told(scene, i)}." for i in order)

    return sentences


def _heard(told: Callable[[Scene, int], str]) -> Callable[[Scene, random.Random], str]:
    def sentence(scene: Scene, words: random.Random) -> str:
        return f"You hear the {scene.sounding.shape}: it {told(scene, 0)}."

    return sentence


def _picture(scene: Scene, words: random.Random) -> str:
    return f"{_each(_in_picture)(scene, words)}{_relations(scene, words)}"


def _relations(scene: Scene, words: random.Random) -> str:
    """Up to four sentences on two things each: where one is, seen from the other, if that is clear, or its size."""
    told = []
    for one, other in permutations(scene.things, 2):
        seen = f"Seen from the {other.shape}, the {one.shape} is"
        told += [f"{seen} {where}." for where in RELATIONS if holds(one.xy, other.xy, where)]
        if one.size != other.size:
            larger = "larger" if one.size == "large" else "smaller"
            told.append(f"Of the {one.shape} and the {other.shape}, the {one.shape} is {larger}.")
    return "".join(f" {sentence}" for sentence in words.sample(told, min(_MAX_RELATIONS, len(told))))


_DETAILS: dict[tuple[str, ...], Callable[[Scene, random.Random], str]] = {
    ("image",): _picture,
    ("video",): _each(_in_video),
    ("audio", "image"): _heard(_in_picture),
    ("audio", "video"): _heard(_in_video),
}
