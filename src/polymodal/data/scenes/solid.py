"""The point cloud of a scene: one coloured solid, as binary PLY.

Legend: N points.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from polymodal.data.scenes.latent import COLOURS, Scene

NUM_POINTS = 512
SCALES = {"small": 0.5, "large": 1.0}
"""Half of the solid's height, in the cloud's units, give or take 10 %."""
_JITTER = 0.012
_TORUS_TUBE = 0.35

Uniform = NDArray[np.float64]
Surface = Callable[[Uniform], Uniform]


def _round(angle: Uniform, radius: Uniform | float, z: Uniform) -> Uniform:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)


def _cube(u_N3: Uniform) -> Uniform:
    """Six faces of the cube -1..1; u[:, 2] chooses the face."""
    face = (u_N3[:, 2] * 6).astype(np.int64)
    points = np.empty((len(u_N3), 3))
    rows = np.arange(len(u_N3))
    axis = face % 3
    points[rows, axis] = np.where(face < 3, -1.0, 1.0)
    points[rows, (axis + 1) % 3] = 2 * u_N3[:, 0] - 1
    points[rows, (axis + 2) % 3] = 2 * u_N3[:, 1] - 1
    return points * 0.85


def _sphere(u_N3: Uniform) -> Uniform:
    z = 2 * u_N3[:, 0] - 1
    return _round(2 * np.pi * u_N3[:, 1], np.sqrt(1 - z * z), z)


def _cylinder(u_N3: Uniform) -> Uniform:
    """Radius 0.7, height 2; u[:, 2] chooses wall (area 2.8 pi) or one of the lids (0.49 pi each)."""
    lid = 0.49 / (2.8 + 0.98)
    choice = u_N3[:, 2]
    is_wall = choice >= 2 * lid
    z = np.where(is_wall, 2 * u_N3[:, 0] - 1, np.where(choice < lid, -1.0, 1.0))
    radius = np.where(is_wall, 0.7, 0.7 * np.sqrt(u_N3[:, 0]))
    return _round(2 * np.pi * u_N3[:, 1], radius, z)


def _cone(u_N3: Uniform) -> Uniform:
    """Base radius 0.9, height 2; u[:, 2] chooses the side (slant 2.193) or the base."""
    side = 2.193 / (2.193 + 0.9)
    is_side = u_N3[:, 2] < side
    radius = 0.9 * np.sqrt(u_N3[:, 0])
    z = np.where(is_side, 1 - 2 * radius / 0.9, -1.0)
    return _round(2 * np.pi * u_N3[:, 1], radius, z)


def _torus(u_N3: Uniform) -> Uniform:
    """Ring radius 1, tube 0.35, standing; the angle around the tube is drawn in proportion to area by rejection."""
    angle = 2 * np.pi * u_N3[:, 0]
    # Reflect the angles that rejection would refuse to the outer side: the same density without a loop.
    refuse = u_N3[:, 2] * (1 + _TORUS_TUBE) > 1 + _TORUS_TUBE * np.cos(angle)
    angle = np.where(refuse & (np.cos(angle) < 0), np.pi - angle, angle)
    radius = 1 + _TORUS_TUBE * np.cos(angle)
    ring = _round(2 * np.pi * u_N3[:, 1], radius, _TORUS_TUBE * np.sin(angle))
    return ring[:, [0, 2, 1]] * 0.75


SURFACES: dict[str, Surface] = {"cube": _cube, "sphere": _sphere, "cylinder": _cylinder, "cone": _cone, "torus": _torus}
_RECORD = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
_HEADER = (
    "ply\nformat binary_little_endian 1.0\ncomment generated solid\n"
    f"element vertex {NUM_POINTS}\n"
    "property float x\nproperty float y\nproperty float z\n"
    "property uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n"
).encode()


def cloud(scene: Scene) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Points ``[512, 3]`` (z up) and colours ``[512, 3]`` (sRGB), turned about z at random, with jitter."""
    rng = scene.generator(3)
    kind, size, colour = scene.solid
    points = SURFACES[kind](rng.random((NUM_POINTS, 3)))
    turn = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(turn), np.sin(turn)
    points = points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    points = points * (SCALES[size] * rng.uniform(0.9, 1.1)) + rng.normal(0, _JITTER, points.shape)
    shades = np.array(COLOURS[colour]) + rng.integers(-12, 13, (NUM_POINTS, 1))
    return points.astype(np.float32), np.clip(shades, 0, 255).astype(np.uint8)


def cloud_ply(scene: Scene) -> bytes:
    """The point cloud as binary PLY with 8-bit colours."""
    points, colours = cloud(scene)
    records = np.empty(NUM_POINTS, dtype=_RECORD)
    records["xyz"], records["rgb"] = points, colours
    return _HEADER + records.tobytes()
