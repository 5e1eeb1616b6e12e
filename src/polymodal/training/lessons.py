"""What objectives read beside the model's own outputs: what teachers say of the batch, and pulls on the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import ConfigError
from polymodal.models.compose import MultimodalModel
from polymodal.objectives.consolidation import Consolidation
from polymodal.objectives.distill import teachers_of
from polymodal.objectives.table import WeightedObjective
from polymodal.training.consolidation import Anchor


@dataclass(slots=True)
class Lessons:
    """Teachers and anchors of a stage; none of them is among the model's weights, and none is saved with them.

    Args:
        teachers: by the path that the recipe names; frozen, in evaluation mode.
        anchors: by the objective's key.
    """

    teachers: Mapping[str, MultimodalModel] = field(default_factory=dict)
    anchors: Mapping[str, Anchor] = field(default_factory=dict)

    def check(self, objectives: Sequence[WeightedObjective]) -> None:
        """Prove that everything the objectives read is there.

        Raises:
            ConfigError: if something is missing.
        """
        absent = [path for path in teachers_of(objectives) if path not in self.teachers]
        keys = [entry.config.key for entry in objectives if isinstance(entry.config, Consolidation)]
        absent += [key for key in keys if key not in self.anchors]
        if absent:
            raise ConfigError(f"objectives: nothing was opened for {absent}, expected a teacher or an estimate each")

    def add(
        self,
        model: MultimodalModel,
        objectives: Sequence[WeightedObjective],
        batch: Batch,
        outputs: Outputs,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Put what the objectives read into ``outputs``."""
        for path, passes in teachers_of(objectives).items():
            with torch.no_grad(), autocast():
                outputs.teachers[path] = self.teachers[path](batch, passes)
        for entry in objectives:
            if isinstance(entry.config, Consolidation) and entry.config.key in self.anchors:
                outputs.penalties[entry.config.key] = self.anchors[entry.config.key].penalty(model)
