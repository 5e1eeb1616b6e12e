"""Staying near the weights that an old task needs."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from polymodal.core.batch import Batch, Outputs
from polymodal.core.passes import Pass
from polymodal.objectives.report import LossReport, ObjectiveConfig


class Consolidation(ObjectiveConfig):
    """Pulls every trained weight back to its value at the start of the stage, as firmly as an old task needs it.

    The loss is half the squared distance, weighed by the diagonal of the Fisher information, which is estimated when
    the stage starts, from the old stage's own targets and objectives, sample by sample. The estimate is saved in the
    stage's folder, so that a resumed run goes on with the same.

    Args:
        stage: the old stage, whose data and objectives tell what must be kept.
        run: the folder of the run that it belongs to; None: this recipe's own, where it stands before this stage.
        samples: how many of its samples the estimate is the mean over.

    Source: elastic weight consolidation, arXiv 1612.00796, section 2.1, equation 3. The weight of the objective is its
    lambda. With the data's own targets it is the empirical Fisher information.
    """

    use: Literal["ewc"] = "ewc"
    needs: ClassVar[Pass | None] = None  # type: ignore[assignment]
    stage: str
    run: str | None = None
    samples: int = Field(default=200, ge=1)

    @property
    def key(self) -> str:
        """What its penalty is called among the outputs."""
        return f"{self.run or ''}:{self.stage}"

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The penalty; nothing where no estimate was made (``check`` makes none)."""
        penalty = outputs.penalties.get(self.key)
        return LossReport(torch.zeros(())) if penalty is None else LossReport(penalty, count=batch.num_samples)
