"""The points reader: a cloud of any size -> one unit of at most ``num_points`` points."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from polymodal.core.batch import ModelInput
from polymodal.core.parts import Part
from polymodal.modalities.points.decode import load_cloud, probe_points
from polymodal.modalities.points.sampling import farthest_points, random_points
from polymodal.modalities.reader import Reader, ReaderConfig

NEUTRAL_COLOUR = 0.5
"""The grey that stands for the colour of a cloud that has none, where colour is asked for."""


class PointsReaderConfig(ReaderConfig):
    """How a cloud becomes model input: float32 ``[L, 3]`` or ``[L, 6]``, ``L = min(N, num_points)``."""

    modality: ClassVar[str] = "points"
    use: Literal["points"] = "points"
    num_points: PositiveInt = 1024
    """Most points of one unit; smaller clouds are kept whole and in order."""
    colour: bool = True
    """Append rgb in 0..1; clouds without colour get a neutral grey of 0.5."""
    normalise: Literal["unit_sphere", "none"] = "unit_sphere"
    """``unit_sphere``: centroid of the chosen points to 0, farthest of them to distance 1 (absolute size and place
    are lost); ``none``: the coordinates as stored."""
    sampling: Literal["farthest", "random"] = "farthest"
    """How points are chosen from a larger cloud; both are seeded by the content and so deterministic."""


class PointsReader(Reader):
    """Reads ``Points`` parts; one unit each."""

    modality = "points"
    is_ragged = True
    config: PointsReaderConfig

    def measure(self, part: Part) -> tuple[int, ...]:
        """``(min(N, num_points),)``.

        Raises:
            MediaError: as :func:`probe_points` does.
        """
        return (min(probe_points(part, self.limits).num_points, self.config.num_points),)

    def read(self, part: Part) -> ModelInput:
        """Decode, choose and normalise the points.

        Raises:
            MediaError: as :func:`decode_points` does.
        """
        xyz, rgb = load_cloud(part, self.limits)
        if len(xyz) > self.config.num_points:
            choose = farthest_points if self.config.sampling == "farthest" else random_points
            chosen = choose(xyz, self.config.num_points)
            xyz, rgb = xyz[chosen], None if rgb is None else rgb[chosen]
        if self.config.normalise == "unit_sphere":
            xyz = unit_sphere(xyz)
        if self.config.colour:
            xyz = np.concatenate([xyz, np.full_like(xyz, NEUTRAL_COLOUR) if rgb is None else rgb], axis=1)
        return ModelInput([np.ascontiguousarray(xyz, dtype=np.float32)], (len(xyz),))

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3,)``, or ``(6,)`` with colour."""
        return (6,) if self.config.colour else (3,)


def unit_sphere(xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """``xyz`` moved to its centroid and scaled so that the farthest point has distance 1; one point becomes 0."""
    centred: NDArray[np.float64] = xyz - xyz.mean(axis=0)
    radius = float(np.sqrt((centred**2).sum(axis=1).max()))
    return centred / radius if radius > 0 else centred
