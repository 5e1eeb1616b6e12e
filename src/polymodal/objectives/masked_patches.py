"""Mean squared error of rebuilt pixels. Legend: ``K`` masked patches, ``C`` values of a patch."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from polymodal.core.batch import Batch, Outputs
from polymodal.core.passes import Pass
from polymodal.objectives.report import LossReport, ObjectiveConfig, required, wide


class MaskedPatches(ObjectiveConfig):
    """Mean squared error between what a ``masked_patches`` head rebuilds and what was there.

    Source: VideoMAE, arXiv 2203.12602, section 3.1, equation 1.
    """

    use: Literal["masked_patches"] = "masked_patches"
    needs: ClassVar[Pass] = "rebuild"

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The loss, in squared units of the targets (1 is what a constant mean reaches where they are normalised)."""
        rebuilt_KC = required(outputs.rebuilt, self.use, "rebuilt", "a masked_patches head")
        if not len(rebuilt_KC):
            return LossReport(torch.zeros(()))
        return LossReport(F.mse_loss(wide(rebuilt_KC), wide(outputs.rebuilt_targets)), {}, batch.num_samples)
