"""Questions about things by their names, in conversations and one at a time: they are true, and balanced."""

import re
from collections import Counter

import pytest

from polymodal.data.scenes import HELD_OUT, make_scene
from polymodal.data.scenes.captions import place
from polymodal.data.scenes.details import lookups
from polymodal.data.scenes.drills import drills
from polymodal.data.scenes.latent import COLOURS, DIRECTIONS, SHAPES
from polymodal.data.scenes.layout import STEP_PX, STEPS, holds
from polymodal.data.scenes.picture import video_indices


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(0, "train", i) for i in range(300)]


def by_name(scene):
    return {thing.shape: (index, thing) for index, thing in enumerate(scene.things)}


def test_lookups_of_a_picture_tell_where_and_how_large_each_named_thing_is(scenes):
    kinds = Counter()
    for scene in scenes[:300]:
        things = by_name(scene)
        for text, answer in lookups(scene, "image", scene.words(2)):
            first, *second = [things[word][1] for word in re.findall(r"\w+", text) if word in things]
            if second:
                one, other = (second[0], first) if text.startswith(("On", "Seen")) else (first, second[0])
                assert holds(one.xy, other.xy, answer), (text, answer)
            else:
                assert answer == (first.size if "large" in text or "size" in text else place(first)), (text, answer)
            kinds[len(second)] += 1
    assert min(kinds.values()) > 300


def test_lookups_of_a_video_tell_what_each_named_thing_does_and_when_it_blinks(scenes):
    answers = Counter()
    for scene in scenes[:300]:
        things = by_name(scene)
        for text, answer in lookups(scene, "video", scene.words(2)):
            (index,) = [things[word][0] for word in re.findall(r"\w+", text) if word in things]
            if "blink" in text:
                times = [f for f, frame in enumerate(black_pixels(scene)) if frame[index]]
                assert bool(times) == (answer != "never"), (text, answer)
                assert answer not in ("first", "once") or min(times) < 3
                assert answer != "second" or min(times) >= 4
            else:
                assert answer == (f"moves {scene.moves[index]}" if scene.moves[index] else "stays")
            answers[answer] += 1
    assert {"never", "once", "first", "second", "stays"} < set(answers)


def test_drills_of_a_picture_ask_one_thing_each_and_are_true(scenes):
    kinds = Counter()
    for scene in scenes[:300]:
        things = by_name(scene)
        for text, answer in drills(scene, "image", scene.words(2)):
            named = [things[word][1] for word in re.findall(r"\w+", text) if word in things]
            if answer in ("yes", "no"):
                kind, pair = "existence", next((c, s) for c in COLOURS for s in SHAPES if f"{c} {s}" in text)
                assert (answer == "yes") == (pair in {(t.colour, t.shape) for t in scene.things}), (text, answer)
                assert pair not in HELD_OUT
            elif text.startswith(("Which is", "The")) and len(named) == 2:
                kind, size = "comparison", "small" if "smaller" in text else "large"
                assert [thing.shape for thing in named if thing.size == size] == [answer], (text, answer)
            elif len(named) == 2:
                kind = "relation"
                one, other = reversed(named) if text.startswith(("On", "Seen")) else named
                assert holds(one.xy, other.xy, answer), (text, answer)
            else:
                (thing,) = named
                kind = next(word for word in ("colour", "large", "size", "Where", "part") if word in text)
                told = {"colour": thing.colour, "large": thing.size, "size": thing.size}
                assert answer == told.get(kind, place(thing)), (text, answer)
            kinds[kind] += 1
    assert min(kinds.values()) > 100 and len(kinds) == 8


def test_drills_ask_for_pairs_that_are_there_as_often_as_for_others(scenes):
    answers = Counter(answer for scene in scenes[:300] for _, answer in drills(scene, "image", scene.words(2)))
    assert answers["yes"] == answers["no"] == 300


def test_drills_of_a_video_tell_what_each_named_thing_does_and_when_it_blinks(scenes):
    answers = Counter()
    for scene in scenes[:300]:
        things = by_name(scene)
        for text, answer in drills(scene, "video", scene.words(2)):
            index, *second = [things[word][0] for word in re.findall(r"\w+", text) if word in things]
            times = [f for f, frame in enumerate(black_pixels(scene)) if frame[index]]
            if second:
                assert answer == scene.things[scene.blinks[0]].shape and {index, *second} == set(scene.blinks)
            elif "blink" in text:
                assert bool(times) == (answer != "never"), (text, answer)
                assert answer not in ("first", "once") or min(times) < 3
                assert answer != "second" or min(times) >= 4
            elif "colour" in text:
                assert answer == scene.colours[index]
            elif answer in DIRECTIONS:
                assert answer == scene.moves[index] and re.search("way|direction", text), (text, answer)
            else:
                assert answer == (f"moves {scene.moves[index]}" if scene.moves[index] else "stays")
            answers[answer] += 1
    assert {"never", "once", "first", "second", "stays", *DIRECTIONS, *COLOURS} < set(answers)


def black_pixels(scene):
    """Per frame, whether the centre of each thing is black."""
    frames, palette = video_indices(scene)
    for number, frame in enumerate(frames):
        seen = []
        for thing, move in zip(scene.things, scene.moves, strict=True):
            x, y = (round(at + step * STEP_PX * number) for at, step in zip(thing.video_xy, STEPS[move], strict=True))
            seen.append(bool((palette[frame[y, x]] < 30).all()))
        yield seen
