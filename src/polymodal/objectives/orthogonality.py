"""Keeping an alignment network's matrices near rotations."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import ConfigError
from polymodal.core.passes import Pass
from polymodal.objectives.report import LossReport, ObjectiveConfig


class Orthogonality(ObjectiveConfig):
    """Draws the matrices by which an encoder aligns its features towards orthogonal ones, which lose nothing.

    ``|| I - A A^T ||^2``, the mean over the clouds of a batch; published with the weight 0.001. It reads what the
    encoder computed for another objective, which must read the stream.

    Source: PointNet, arXiv 1612.00593, section 4.2 equation 2, and supplementary C.

    Args:
        stream: of points, with the encoder ``pointnet_aligned``.
    """

    use: Literal["orthogonality"] = "orthogonality"
    needs: ClassVar[Pass | None] = None  # type: ignore[assignment]
    stream: str = "points"

    def count(self, batch: Batch) -> int:
        """The stream's clouds."""
        return len(batch.streams[self.stream].unit_counts) if self.stream in batch.streams else 0

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The penalty.

        Raises:
            ConfigError: if the stream was encoded and has no alignment.
        """
        if self.stream not in batch.streams:
            return LossReport(torch.zeros(()))
        penalty = outputs.penalties.get(f"streams.{self.stream}")
        if penalty is None:
            raise ConfigError(
                f"objective orthogonality: found no alignment in stream {self.stream!r}, expected the encoder "
                "pointnet_aligned with align: true, out of the feature cache, and an objective that reads the stream"
            )
        return LossReport(penalty, count=self.count(batch))
