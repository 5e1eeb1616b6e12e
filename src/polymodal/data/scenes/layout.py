"""Where things stand: places that keep them apart, inside the picture, and in the asked relation."""

from __future__ import annotations

import random
from collections.abc import Sequence

SIDE_PX = 64
"""Width and height of the picture and of the video."""
NUM_FRAMES = 8
STEP_PX = 2.0
"""How far a moving thing goes from one frame to the next."""
AREAS_PX = {"small": 72.0, "large": 225.0}
"""Area of a thing; the same for all shapes, so that size is not a matter of outline."""
RADII = {"circle": 0.5642, "square": 0.7072, "triangle": 0.8774, "star": 0.8520, "cross": 0.7682}
"""Largest distance from the centre to the outline, for a shape of area 1."""
STEPS = {"": (0.0, 0.0), "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

_MARGIN_PX = 1.0
_GAP_PX = 1.5
_MIN_SHIFT_PX = 13.0
_MAX_SLOPE = 0.7

Places = list[tuple[float, float]]
Kinds = Sequence[tuple[str, str]]
"""(shape, size) of each thing."""


def radius_px(shape: str, size: str) -> float:
    """The radius of the circle around a thing."""
    return float(RADII[shape] * AREAS_PX[size] ** 0.5)


def place_picture(rng: random.Random, kinds: Kinds, relation: tuple[int, int, str] | None) -> Places:
    """Centres (px, y down) of things that do not touch, with ``relation`` holding clearly.

    A relation is clear when the shift along its axis is at least 13 px, and the shift across it at most 0.7 of that.
    """
    radii = [radius_px(*kind) for kind in kinds]
    while True:
        places = _draw(rng, radii, [("", 0.0)] * len(radii))
        if places is None:
            continue
        if relation is None:
            return places
        first, second, where = relation
        # Turning a good layout is cheaper than waiting for one that has the relation by chance.
        for _ in range(4):
            if holds(places[first], places[second], where):
                return places
            places = [(SIDE_PX - y, x) for x, y in places]


def place_video(rng: random.Random, kinds: Kinds, moves: Sequence[str]) -> Places:
    """Centres at the first frame of things that stay inside and apart until the last one."""
    radii = [radius_px(*kind) for kind in kinds]
    travel = STEP_PX * (NUM_FRAMES - 1)
    while True:
        places = _draw(rng, radii, [(move, travel) for move in moves])
        if places is not None:
            return places


def holds(first: tuple[float, float], second: tuple[float, float], where: str) -> bool:
    """Whether ``first`` stands clearly left, right, above or below ``second``."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    along = {"left": -dx, "right": dx, "above": -dy, "below": dy}[where]
    across = abs(dy if where in ("left", "right") else dx)
    return along >= _MIN_SHIFT_PX and across <= _MAX_SLOPE * along


def _draw(rng: random.Random, radii: Sequence[float], travels: Sequence[tuple[str, float]]) -> Places | None:
    """Random starts, one thing after the other; None as soon as one finds no place in a few tries."""
    places: Places = []
    for i, (radius, (move, travel)) in enumerate(zip(radii, travels, strict=True)):
        step_x, step_y = STEPS[move]
        low, high = radius + _MARGIN_PX, SIDE_PX - radius - _MARGIN_PX
        for _ in range(6):
            x = rng.uniform(low - min(0.0, step_x) * travel, high - max(0.0, step_x) * travel)
            y = rng.uniform(low - min(0.0, step_y) * travel, high - max(0.0, step_y) * travel)
            if all(_apart((x, y), travels[i], places[j], travels[j], radius + radii[j] + _GAP_PX) for j in range(i)):
                places.append((x, y))
                break
        else:
            return None
    return places


def _apart(
    one: tuple[float, float],
    move: tuple[str, float],
    other: tuple[float, float],
    other_move: tuple[str, float],
    distance: float,
) -> bool:
    """Whether two straight moves at constant speed keep their centres ``distance`` apart all the time."""
    dx, dy = one[0] - other[0], one[1] - other[1]
    if not move[0] and not other_move[0]:
        return dx * dx + dy * dy >= distance * distance
    vx = STEPS[move[0]][0] * move[1] - STEPS[other_move[0]][0] * other_move[1]
    vy = STEPS[move[0]][1] * move[1] - STEPS[other_move[0]][1] * other_move[1]
    speed = vx * vx + vy * vy
    nearest = 0.0 if speed == 0 else min(1.0, max(0.0, -(dx * vx + dy * vy) / speed))
    dx, dy = dx + nearest * vx, dy + nearest * vy
    return dx * dx + dy * dy >= distance * distance
