"""Cross-entropy over a closed set of classes.

Shape legend: ``S`` samples, ``C`` classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import field_validator

from polymodal.core.batch import Batch, Outputs
from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError, SampleError
from polymodal.objectives.report import LossReport, ObjectiveConfig, Pass, required, wide


class Classify(ObjectiveConfig):
    """Cross-entropy of ``class_logits`` against the samples' labels; samples without a label are left out.

    Args:
        classes: the class names in the order of the logits.
    """

    use: Literal["classify"] = "classify"
    needs: ClassVar[Pass] = "merge"
    classes: tuple[str, ...]

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({name for name in classes if classes.count(name) > 1})
        if len(classes) < 2 or repeated:
            raise ValueError(f"expected at least two distinct class names, {len(classes)} given, repeated: {repeated}")
        return classes

    def count(self, batch: Batch) -> int:
        """The samples that have a label."""
        return sum(label is not None for label in batch.labels)

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The mean loss in nats, with the accuracy as a part.

        Raises:
            ConfigError: if the head has another number of classes.
            SampleError: if a sample's label is not one of ``classes``.
        """
        logits_SC = required(outputs.class_logits, self.use, "class_logits", "a class head")
        if logits_SC.shape[1] != len(self.classes):
            raise ConfigError(
                f"objective {self.use}: the class head has {logits_SC.shape[1]} outputs, expected "
                f"{len(self.classes)}, one per name in 'classes'"
            )
        rows, targets = [], []
        for row, (sample, label) in enumerate(zip(batch.sample_ids, batch.labels, strict=True)):
            if label is None:
                continue
            if label not in self.classes:
                raise SampleError(sample, f"objective {self.use}: {unknown('label', label, self.classes)}")
            rows.append(row)
            targets.append(self.classes.index(label))
        if not rows:
            return LossReport(torch.zeros(()))
        logits = wide(logits_SC)[torch.tensor(rows, device=logits_SC.device)]
        expected = torch.tensor(targets, device=logits_SC.device)
        accuracy = (logits.argmax(1) == expected).float().mean()
        return LossReport(F.cross_entropy(logits, expected), {"accuracy": accuracy}, len(rows))
