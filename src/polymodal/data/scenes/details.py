"""What is true of each thing by its name, sentence by sentence: the thing first, then what has to be looked up.

A caption goes through the places of a picture and says what stands there. Questions go the other way, from a name to
a place, a size or a direction; these texts teach that way densely, where a question teaches one word at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import permutations

from polymodal.data.scenes.captions import TO_RELATION, and_list, place
from polymodal.data.scenes.latent import RELATIONS, Scene
from polymodal.data.scenes.layout import holds

DETAIL_REQUESTS = {
    ("image",): ("Describe every object.", "Go through the objects one by one.", "Tell me about each object."),
    ("video",): ("Describe every object.", "Go through the objects one by one.", "Tell me about each object."),
    ("audio", "image"): ("Describe the object that you hear.", "Tell me about the object that sounds."),
    ("audio", "video"): ("Describe the object that you hear.", "Tell me about the object that sounds."),
}
"""Per set of media, what a user says to have things described by name."""

_MAX_RELATIONS = 4
_ORDINALS = ("first", "second")


def details(scene: Scene, media: tuple[str, ...], words: random.Random) -> str:
    """The sentences about the things that a set of media shows; ``words`` chooses their order.

    Args:
        scene: the scene.
        media: a key of :data:`DETAIL_REQUESTS`.
        words: the source of choices.
    """
    return _DETAILS[media](scene, words)


def _in_picture(scene: Scene, index: int) -> str:
    thing = scene.things[index]
    return f"is {thing.size}, {thing.colour} and {place(thing)}"


def _in_video(scene: Scene, index: int) -> str:
    move = scene.moves[index]
    told = [f"is {scene.things[index].colour}", f"moves {move}" if move else "stays"]
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
        name, than = f"The {one.shape} is", f"the {other.shape}."
        told += [f"{name} {TO_RELATION[where]} {than}" for where in RELATIONS if holds(one.xy, other.xy, where)]
        if one.size != other.size:
            told.append(f"{name} {'larger' if one.size == 'large' else 'smaller'} than {than}")
    return "".join(f" {sentence}" for sentence in words.sample(told, min(_MAX_RELATIONS, len(told))))


_DETAILS: dict[tuple[str, ...], Callable[[Scene, random.Random], str]] = {
    ("image",): _picture,
    ("video",): _each(_in_video),
    ("audio", "image"): _heard(_in_picture),
    ("audio", "video"): _heard(_in_video),
}
