"""The latent scene: everything that any medium of one scene shows, drawn from (seed, split, index) alone.

Balance rests on two rules. Whatever a question asks for is drawn from a stratum (:func:`stratum`), which takes every
value equally often; and the rest is exchangeable: shapes, colours, places and roles are drawn without looking at the
answer, so that the wording of a question says nothing about it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from polymodal.core.errors import DataError
from polymodal.data.scenes.layout import place_picture, place_video

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (34, 150, 62),
    "blue": (44, 74, 214),
    "yellow": (238, 200, 24),
    "purple": (150, 52, 186),
    "cyan": (30, 190, 206),
}
"""Name -> 8-bit sRGB."""
SIZES = ("small", "large")
SOUNDS = {"circle": "beep", "square": "buzz", "triangle": "chirp", "star": "ring", "cross": "hiss"}
"""The voice of each shape: the sound that it makes."""
DIRECTIONS = ("left", "right", "up", "down")
RELATIONS = ("left", "right", "above", "below")
SOLIDS = ("cube", "sphere", "cylinder", "cone", "torus")
MOTIONS = ("shake", "spin", "lift", "drop", "tap", "still")
NUMBERS = ("zero", "one", "two", "three", "four")
HELD_OUT = (("green", "circle"), ("purple", "square"), ("red", "triangle"), ("blue", "star"), ("yellow", "cross"))
"""(colour, shape) pairs that only the split ``novel`` shows. Fixed, so that corpora of all seeds agree."""
SEEN = tuple((c, s) for s in SHAPES for c in COLOURS if (c, s) not in HELD_OUT)
"""The pairs of ``train`` and ``val``: five colours for each shape."""
SPLITS = ("train", "val", "novel")
MAX_LARGE = 2

_STREAMS = {"train": 0, "val": 1, "novel": 2, "train-text": 3, "val-text": 4, "novel-text": 5}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is, and where its centre is (px, y down) in the picture and at the video's first frame."""

    shape: str
    colour: str
    size: str
    xy: tuple[float, float]
    video_xy: tuple[float, float]
    angle_deg: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene.

    Args:
        stream: the split, or ``{split}-text`` for the scenes behind text-only data.
        index: number within the stream.
        things: 1 to 4 objects of different shapes; the first one sounds.
        sound_count: how often it sounds, 1 to 4.
        moves: per thing its direction in the video, or "" where it stays; two things move (one in scenes of one).
        blinks: the things that blink in the video, in order.
        relation: (first, second, where the first is relative to the second), or None in scenes of one.
        compared: (one thing, another thing) of different sizes, in the order in which a question names them.
        counted_colour: the colour that the counting question asks for; None asks for all things.
        solid: (kind, size, colour) of the point cloud.
        motion: what the sensor felt.
    """

    seed: int
    stream: str
    index: int
    things: tuple[Thing, ...]
    sound_count: int
    moves: tuple[str, ...]
    blinks: tuple[int, ...]
    relation: tuple[int, int, str] | None
    compared: tuple[int, int] | None
    counted_colour: str | None
    solid: tuple[str, str, str]
    motion: str

    @property
    def split(self) -> str:
        """The split that the scene belongs to."""
        return self.stream.removesuffix("-text")

    @property
    def sounding(self) -> Thing:
        """The object that is heard."""
        return self.things[0]

    @property
    def colours(self) -> tuple[str, ...]:
        """The colour of each thing."""
        return tuple(thing.colour for thing in self.things)

    def stratum(self, purpose: str, size: int) -> int:
        """This scene's stratum; see :func:`stratum`."""
        return stratum(self.seed, self.stream, self.index, purpose, size)

    def words(self, purpose: int = 1) -> random.Random:
        """The source of choices of wording, independent of everything in the scene; one for each purpose above 0."""
        return random.Random(_state(self.seed, self.stream, self.index, purpose))

    def generator(self, medium: int) -> np.random.Generator:
        """The source of noise of one medium."""
        return np.random.Generator(np.random.PCG64([self.seed, _STREAMS[self.stream], self.index, 2 + medium]))


def stratum(seed: int, stream: str, index: int, purpose: str, size: int) -> int:
    """A value in 0..size-1 that every block of ``size`` consecutive indices takes exactly once, in a random rotation.

    Worked example: size 2 may give 1 0 | 0 1 | 1 0 for the indices 0 to 5.
    """
    block, place = divmod(index, size)
    shift = (seed * 0x9E3779B97F4A7C15 + _STREAMS[stream] * 0xD1B54A32D192ED03 + block) & _MASK
    for letter in purpose.encode():
        shift = _mix(shift ^ letter)
    return (place + shift) % size


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: neighbouring inputs give unrelated outputs."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _state(seed: int, stream: str, index: int, purpose: int) -> int:
    sequence = np.random.SeedSequence([seed, _STREAMS[stream], index, purpose])
    return int(sequence.generate_state(1, np.uint64)[0])


def make_scene(seed: int, stream: str, index: int) -> Scene:
    """The scene of this seed, stream and index; no other scene is needed to make it.

    Raises:
        DataError: if the stream is unknown, or seed or index is negative.
    """
    if stream not in _STREAMS or seed < 0 or index < 0:
        raise DataError(
            f"found seed {seed}, stream {stream!r}, index {index}; expected seed and index of at least 0 "
            f"and a stream of {', '.join(_STREAMS)}"
        )
    rng = random.Random(_state(seed, stream, index, 0))

    def pick(purpose: str, size: int) -> int:
        return stratum(seed, stream, index, purpose, size)

    is_novel = stream.startswith("novel")
    pairs = HELD_OUT if is_novel else SEEN
    first = pairs[pick("pair", len(pairs))]
    number, counted, shared = _count_plan(rng, first[0], pick, is_novel)
    colours, shapes = _kinds(rng, first, number, counted, shared)
    relation = compared = None
    if number > 1:
        one, other = _two(rng, number, is_novel)
        relation = (one, other, RELATIONS[pick("relation", 4)])
        compared = _two(rng, number, is_novel)
    sizes = _sizes(rng, number, compared, pick("larger", 2))
    moves = _moves(rng, number, DIRECTIONS[pick("direction", 4)])
    places = place_picture(rng, list(zip(shapes, sizes, strict=True)), relation)
    has_media = not stream.endswith("-text")
    starts = place_video(rng, list(zip(shapes, sizes, strict=True)), moves) if has_media else places
    things = tuple(
        Thing(shape, colour, size, xy, start, rng.uniform(-12, 12))
        for shape, colour, size, xy, start in zip(shapes, colours, sizes, places, starts, strict=True)
    )
    return Scene(
        seed=seed,
        stream=stream,
        index=index,
        things=things,
        sound_count=1 + pick("sound_count", 4),
        moves=moves,
        blinks=_two(rng, number, is_novel) if number > 1 else (0,),
        relation=relation,
        compared=compared,
        counted_colour=counted,
        solid=(SOLIDS[pick("solid", 5)], SIZES[pick("solid_size", 2)], rng.choice(tuple(COLOURS))),
        motion=MOTIONS[pick("motion", 6)],
    )


def alone(scene: Scene) -> Scene:
    """The scene with its first thing only: what it is and how it moves stay as they are."""
    return replace(
        scene,
        things=scene.things[:1],
        moves=scene.moves[:1],
        blinks=(0,),
        relation=None,
        compared=None,
    )


def paired(scene: Scene) -> Scene:
    """A video of the scene's first thing and one other: one of the two moves, or both do, each its own way; both blink.

    Who does what is drawn anew, and the places with it, so that neither shape nor order of naming tells.
    """
    rng = scene.words(3)
    first = scene.things[0]
    shape = rng.choice([shape for shape in SHAPES if shape != first.shape])
    colour = rng.choice([colour for colour in COLOURS if (colour, shape) not in HELD_OUT])
    kinds = [(first.shape, rng.choice(SIZES)), (shape, rng.choice(SIZES))]
    one, other = rng.sample(DIRECTIONS, 2)
    moves = rng.choice(((one, ""), ("", one), (one, other)))
    starts = place_video(rng, kinds, moves)
    things = tuple(
        Thing(shape, colour, size, start, start, rng.uniform(-12, 12))
        for (shape, size), colour, start in zip(kinds, (first.colour, colour), starts, strict=True)
    )
    blinks = rng.choice(((0, 1), (1, 0)))
    return replace(scene, things=things, moves=moves, blinks=blinks, relation=None, compared=None)


def _count_plan(
    rng: random.Random, colour: str, pick: Callable[[str, int], int], is_novel: bool
) -> tuple[int, str | None, set[int]]:
    """How many things there are, which colour is counted (None: all), and which things share it.

    Half of the scenes are for counting everything: 1 to 4 things, equally often. The others are for counting a
    colour that 0 to 3 things have, equally often (1 to 3 in ``novel``, where it is the held-out thing's colour).
    """
    if pick("counts all", 2):
        number = 1 + pick("number", 4)
        return number, None, set()
    sharing = 1 + pick("sharing", 3) if is_novel else pick("sharing", 4)
    number = rng.randint(max(2, sharing + (sharing < 3)), 4)
    # The first thing is no more likely to have the counted colour than any other.
    has_first = is_novel or rng.random() < sharing / number
    if not has_first:
        return number, rng.choice([c for c in COLOURS if c != colour]), set(rng.sample(range(1, number), sharing))
    return number, colour, {0, *rng.sample(range(1, number), sharing - 1)}


def _kinds(
    rng: random.Random, first: tuple[str, str], number: int, counted: str | None, shared: set[int]
) -> tuple[list[str], list[str]]:
    """Colours and shapes. Shapes are unique; colours are too, but for those of the things that share one."""
    while True:
        shapes = [first[1], *rng.sample([s for s in SHAPES if s != first[1]], number - 1)]
        free = rng.sample(
            [c for c in COLOURS if c not in (first[0], counted)], len(COLOURS) - len({first[0], counted} - {None})
        )
        colours = [first[0]]
        for i in range(1, number):
            colours.append(counted if counted is not None and i in shared else free.pop())
        if all(pair not in HELD_OUT for pair in list(zip(colours, shapes, strict=True))[1:]):
            return colours, shapes


def _two(rng: random.Random, number: int, with_first: bool) -> tuple[int, int]:
    """Two different things in random order; one of them is the first where ``with_first``."""
    two = [0, rng.randrange(1, number)] if with_first else rng.sample(range(number), 2)
    rng.shuffle(two)
    return two[0], two[1]


def _sizes(rng: random.Random, number: int, compared: tuple[int, int] | None, larger: int) -> list[str]:
    if compared is None:
        return [rng.choice(SIZES)]
    sizes = ["small"] * number
    sizes[compared[larger]] = "large"
    rest = [i for i in range(number) if i not in compared]
    if rest and rng.random() < 0.5:
        sizes[rng.choice(rest)] = "large"
    return sizes


def _moves(rng: random.Random, number: int, direction: str) -> tuple[str, ...]:
    moves = [direction] + [""] * (number - 1)
    if number > 1:
        moves[rng.randrange(1, number)] = rng.choice([d for d in DIRECTIONS if d != direction])
    return tuple(moves)
