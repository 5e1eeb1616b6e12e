"""Choosing a fixed number of points from a cloud, the same ones every time for the same cloud."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

PREFILTER_FACTOR = 8
"""Farthest-point sampling first draws this many candidates per wanted point at random from larger clouds."""


def content_rng(xyz: NDArray[np.float64]) -> np.random.Generator:
    """A generator seeded by the coordinates: equal clouds are sampled equally, whatever file they came from."""
    digest = hashlib.blake2b(np.ascontiguousarray(xyz).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def random_points(xyz: NDArray[np.float64], num_points: int) -> NDArray[np.int64]:
    """``num_points`` distinct indices drawn uniformly, int64, in rising order."""
    chosen = content_rng(xyz).choice(len(xyz), num_points, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)


def farthest_points(xyz: NDArray[np.float64], num_points: int) -> NDArray[np.int64]:
    """``num_points`` distinct indices, int64, each the farthest from all before it; the first is drawn by content.

    Source: Eldar et al., "The Farthest Point Strategy for Progressive Image Sampling" (1997), as used by PointNet++
    (Qi et al., 2017), section 3.2. Deviation: clouds of more than ``PREFILTER_FACTOR * num_points`` points are first
    thinned to that many at random, so that time does not grow with the scan.
    """
    rng = content_rng(xyz)
    candidates = np.arange(len(xyz))
    if len(xyz) > PREFILTER_FACTOR * num_points:
        size = PREFILTER_FACTOR * num_points
        candidates = np.sort(rng.choice(len(xyz), size, replace=False, shuffle=False))
    points = xyz[candidates] - xyz[candidates].mean(axis=0)
    points /= max(float(np.abs(points).max()), 1e-30)
    x, y, z = (np.ascontiguousarray(points[:, axis], dtype=np.float32) for axis in range(3))
    nearest = np.full(len(points), np.inf, dtype=np.float32)
    squared, term = np.empty_like(x), np.empty_like(x)
    chosen = np.empty(num_points, dtype=np.int64)
    index = int(rng.integers(len(points)))
    for step in range(num_points):
        chosen[step] = index
        np.subtract(x, x[index], out=squared)
        np.multiply(squared, squared, out=squared)
        for axis in (y, z):
            np.subtract(axis, axis[index], out=term)
            np.multiply(term, term, out=term)
            np.add(squared, term, out=squared)
        np.minimum(nearest, squared, out=nearest)
        nearest[index] = -1.0  # Never again, even where every remaining point is a duplicate.
        index = int(nearest.argmax())
    return candidates[chosen].astype(np.int64)
