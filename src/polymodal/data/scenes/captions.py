"""What each medium of a scene shows, in words: templates in which every fact of the medium appears."""

from __future__ import annotations

import random
from collections.abc import Callable

from polymodal.data.scenes.latent import NUMBERS, SOUNDS, Scene, Thing
from polymodal.data.scenes.layout import SIDE_PX

MEDIA = ("image", "audio", "video", "points", "sensor")
REQUESTS = {
    "image": ("Describe this image.", "What does the picture show?", "Describe the picture."),
    "audio": ("Describe this sound.", "What can you hear?", "Describe the recording."),
    "video": ("Describe this video.", "What happens in the video?", "Describe the clip."),
    "points": ("Describe this point cloud.", "What do the points show?", "Describe the solid."),
    "sensor": ("Describe this motion.", "What does the sensor record?", "Describe the recording of the sensor."),
}
"""What a user says to have a medium described."""
NAMING = ("What is this?", "Which object is shown?", "Name the object.")
"""What a user says to have one thing named."""

_TIMES = ("never", "once", "twice", "three times", "four times")
TO_RELATION = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
"""Relation -> the words between two things."""
_PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
_MOTION_TEXTS = {
    "shake": ("The device is shaken.", "Somebody shakes the device: a shake.", "A shake, to and fro."),
    "spin": ("The device is spun: a spin.", "Somebody spins the device.", "A spin about the upright axis."),
    "lift": ("The device is lifted: a lift.", "Somebody lifts the device.", "A lift, upwards."),
    "drop": ("The device is dropped: a drop.", "Somebody drops the device.", "A drop: it falls and hits the ground."),
    "tap": ("The device is tapped: a tap.", "Somebody taps the device.", "A tap from above."),
    "still": ("The device lies still.", "Nobody moves the device: it is still.", "Still: nothing moves."),
}


def caption(scene: Scene, medium: str, words: random.Random) -> str:
    """One caption of one medium; ``words`` chooses the template."""
    return _CAPTIONS[medium](scene, words)


def facts(scene: Scene, medium: str) -> str:
    """The facts of a medium in one canonical line: two items with equal facts are matched by the same captions."""
    if medium == "audio":
        return f"{SOUNDS[scene.sounding.shape]} {scene.sound_count}"
    if medium == "points":
        return " ".join(scene.solid)
    if medium == "sensor":
        return scene.motion
    if medium == "image":
        return "; ".join(f"{place(t)} {t.size} {t.colour} {t.shape}" for t in _reading_order(scene)) + _relation(scene)
    return _video_facts(scene, [f"{thing.colour} {thing.shape}" for thing in scene.things])


def _video_facts(scene: Scene, called: list[str]) -> str:
    things = sorted(zip(scene.things, called, scene.moves, strict=True), key=lambda each: each[0].shape)
    blinks = " ".join(scene.things[i].shape for i in scene.blinks)
    return "; ".join(f"{name} {move or 'stays'}" for _, name, move in things) + f"; {blinks}"


def object_kind(scene: Scene, medium: str) -> str:
    """What kind of thing the one thing of a scene is, in a picture, and how it moves, in a video.

    Colour, size and place are left out: contrast learns the easiest difference between texts first and then has little
    reason to go on, so a text that differs in its kind alone is what teaches kinds (``docs/log.md``).
    """
    shape = scene.things[0].shape
    return f"A {shape}." if medium == "image" else f"A {shape} moves {scene.moves[0]}."


def pair_kinds(scene: Scene, words: random.Random) -> str:
    """Which kinds of things a video shows, how each moves and which blinks first, without colours.

    Colours alone tell the captions of a batch apart; with one thing a video's motion need not be tied to the thing that
    moves. Here nothing else tells, which is what teaches an encoder who moves where (``docs/log.md``).
    """
    return _events(scene, [f"the {thing.shape}" for thing in scene.things], words)


def pair_facts(scene: Scene) -> str:
    """The facts of :func:`pair_kinds` in one canonical line."""
    return _video_facts(scene, [thing.shape for thing in scene.things])


def object_name(scene: Scene, medium: str) -> str:
    """Everything but the place of the one thing of a scene."""
    thing = scene.things[0]
    if medium == "image":
        return f"A {thing.size} {thing.colour} {thing.shape}."
    return f"A {thing.colour} {thing.shape} moves {scene.moves[0]}."


def place(thing: Thing) -> str:
    """Where a thing stands, by thirds of the picture."""
    column, row = cell(thing)
    return _PLACES[row][column]


def cell(thing: Thing) -> tuple[int, int]:
    """The thirds of the picture that a thing's centre is in: from the left, from the top."""
    column, row = (min(2, int(3 * value / SIDE_PX)) for value in thing.xy)
    return column, row


def _reading_order(scene: Scene) -> list[Thing]:
    """Row by row, each from the left: the order in which a picture's patches stand."""
    return sorted(scene.things, key=lambda thing: (min(2, int(3 * thing.xy[1] / SIDE_PX)), thing.xy[0]))


def _relation(scene: Scene) -> str:
    if scene.relation is None:
        return ""
    first, second, where = scene.relation
    return f" The {scene.things[first].shape} is {TO_RELATION[where]} the {scene.things[second].shape}."


def and_list(items: list[str]) -> str:
    """``a``, ``a and b``, or ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _image(scene: Scene, words: random.Random) -> str:
    number = len(scene.things)
    # The place comes first, so that each of the words that follow can be read off one part of the picture.
    listed = and_list([f"{place(t)} a {t.size} {t.colour} {t.shape}" for t in _reading_order(scene)])
    objects = f"{NUMBERS[number]} object" + ("s" if number > 1 else "")
    start = words.choice(
        (
            f"There {'are' if number > 1 else 'is'} {objects}",
            f"The picture shows {objects}",
            f"{objects.capitalize()} can be seen",
        )
    )
    return f"{start}: {listed}.{_relation(scene)}"


def _audio(scene: Scene, words: random.Random) -> str:
    shape = scene.sounding.shape
    sound, times = SOUNDS[shape], _TIMES[scene.sound_count]
    number = NUMBERS[scene.sound_count]
    noun = {"hiss": "hisses"}.get(sound, sound + "s") if scene.sound_count > 1 else sound
    verb = {"hiss": "hisses"}.get(sound, sound + "s")
    return words.choice(
        (
            f"The {shape} {verb} {times}.",
            f"A {shape} is heard: {number} {noun}.",
            f"{number.capitalize()} {noun} of the {shape}.",
        )
    )


def _video(scene: Scene, words: random.Random) -> str:
    return _events(scene, [f"the {thing.colour} {thing.shape}" for thing in scene.things], words)


def _events(scene: Scene, called: list[str], words: random.Random) -> str:
    """How things move, in any order, and which blinks first; ``called`` says what each is called."""
    told = [name + (f" moves {move}" if move else " stays") for name, move in zip(called, scene.moves, strict=True)]
    words.shuffle(told)
    text = and_list(told)
    return f"{text[0].upper()}{text[1:]}. {_blinking(scene, words)}"


def _blinking(scene: Scene, words: random.Random) -> str:
    shapes = [scene.things[i].shape for i in scene.blinks]
    if len(shapes) == 1:
        return f"The {shapes[0]} blinks."
    one, two = shapes
    return words.choice(
        (
            f"The {one} blinks before the {two}.",
            f"The {one} blinks first, then the {two}.",
            f"First the {one} blinks, then the {two}.",
        )
    )


def _points(scene: Scene, words: random.Random) -> str:
    kind, size, colour = scene.solid
    return words.choice(
        (
            f"A {size} {colour} {kind}.",
            f"The points form a {size} {colour} {kind}.",
            f"This is a {size} {kind}, coloured {colour}.",
        )
    )


def _sensor(scene: Scene, words: random.Random) -> str:
    return words.choice(_MOTION_TEXTS[scene.motion])


_CAPTIONS: dict[str, Callable[[Scene, random.Random], str]] = {
    "image": _image,
    "audio": _audio,
    "video": _video,
    "points": _points,
    "sensor": _sensor,
}
