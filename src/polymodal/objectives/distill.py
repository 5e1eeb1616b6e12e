"""Learning from another model.

Legend: ``K`` rows that are compared, ``C`` classes or vocabulary, ``I`` items, ``E`` width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import ConfigError
from polymodal.core.passes import Pass
from polymodal.objectives.report import LossReport, ObjectiveConfig, wide

_PASSES = {"logits": ("sequence", "merge"), "features": ("embed", "merge"), "similarity": ("embed", "merge")}


class Distill(ObjectiveConfig):
    """Draws a model towards what a frozen teacher says of the same batch; the teacher is never saved.

    Args:
        teacher: a run folder, a checkpoint folder, or a hub id. It reads the same batch: its streams are among the
            model's, with the same readers, and the same tokenizer where there is text.
        match: ``logits``: the divergence of the model's distribution from the teacher's, both softened by
            ``temperature`` and multiplied by its square (Hinton, arXiv 1503.02531, section 2). ``features``: squared
            distance of vectors, summed over the axis (FitNets, arXiv 1412.6550, section 2.2, without its regressor:
            both have one width). ``similarity``: the divergence of how the items of a batch resemble each other, as
            softmax over cosines divided by ``temperature``, an item with itself left out; widths may differ (SEED,
            arXiv 2101.04731, section 3.2, with the batch as its queue).
        on: what is compared. Logits: those of tokens (``sequence``) or classes (``merge``). Vectors: the streams' in
            the shared space (``embed``) or the merged states (``merge``). None: the first that is named here.
        temperature: see ``match``.
    """

    use: Literal["distill"] = "distill"
    teacher: str
    match: Literal["logits", "features", "similarity"] = "logits"
    on: Literal["sequence", "embed", "merge"] | None = None
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _agree(self) -> Distill:
        if self.on is not None and self.on not in _PASSES[self.match]:
            raise ValueError(f"match: {self.match} compares {' or '.join(_PASSES[self.match])}, not {self.on}")
        if self.match == "features" and self.temperature != 1.0:
            raise ValueError("temperature: softens distributions; match: features has none, leave it out")
        return self

    @property
    def needs(self) -> Pass:  # type: ignore[override]
        """The pass that gives what is compared, of the model and of the teacher."""
        return self.on or _PASSES[self.match][0]

    def count(self, batch: Batch) -> int:
        """The supervised tokens, or the samples."""
        return int(batch.is_supervised.sum()) if self.needs == "sequence" else batch.num_samples

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The mean over tokens or items, in nats or squared distance; a part per stream where vectors are compared.

        Raises:
            ConfigError: if the two cannot be compared: other widths, classes or streams.
        """
        theirs = outputs.teachers.get(self.teacher)
        if theirs is None:
            raise ConfigError(f"objective distill: no teacher was opened for {self.teacher!r}")
        if self.match == "logits":
            return self._logits(outputs, theirs)
        if self.needs == "merge":
            pairs = {"merged": (outputs.merged, theirs.merged)}
        else:
            pairs = {
                name: (vectors, theirs.embeddings[name][0])
                for name, (vectors, _) in outputs.embeddings.items()
                if name in theirs.embeddings
            }
        least = 2 if self.match == "similarity" else 0
        losses = {name: self._vectors(name, *pair) for name, pair in pairs.items() if len(pair[0]) > least}
        if not losses:
            return LossReport(torch.zeros(()))
        total = torch.stack(list(losses.values())).mean()
        return LossReport(total, {name: loss.detach() for name, loss in losses.items()}, batch.num_samples)

    def _logits(self, outputs: Outputs, theirs: Outputs) -> LossReport:
        mine_KC, theirs_KC = (
            (outputs.token_logits, theirs.token_logits)
            if self.needs == "sequence"
            else (outputs.class_logits, theirs.class_logits)
        )
        if mine_KC is None or theirs_KC is None:
            raise ConfigError(f"objective distill: {self.needs} gives no logits in the model or in the teacher")
        if mine_KC.shape != theirs_KC.shape:
            raise ConfigError(
                f"objective distill: found logits {tuple(mine_KC.shape)}, the teacher's are {tuple(theirs_KC.shape)}; "
                "expected the same vocabulary or classes"
            )
        if not len(mine_KC):
            return LossReport(torch.zeros(()))
        return LossReport(divergence(mine_KC, theirs_KC, self.temperature), count=len(mine_KC))

    def _vectors(self, name: str, mine_IE: Tensor, theirs_IE: Tensor) -> Tensor:
        mine_IE, theirs_IE = wide(mine_IE), wide(theirs_IE)
        if self.match == "features":
            if mine_IE.shape != theirs_IE.shape:
                raise ConfigError(
                    f"objective distill: {name} has vectors of width {mine_IE.shape[1]}, the teacher's have "
                    f"{theirs_IE.shape[1]}; expected the same, or match: similarity"
                )
            return (mine_IE - theirs_IE).square().sum(1).mean()
        return divergence(_likeness(mine_IE, self.temperature), _likeness(theirs_IE, self.temperature), 1.0)


def divergence(mine_KC: Tensor, theirs_KC: Tensor, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence of the rows, teacher from model, times the square of the temperature."""
    mine_KC, theirs_KC = wide(mine_KC) / temperature, wide(theirs_KC) / temperature
    logs = F.log_softmax(mine_KC, 1), F.log_softmax(theirs_KC.detach(), 1)
    return F.kl_div(*logs, reduction="batchmean", log_target=True) * temperature**2


def _likeness(x_IE: Tensor, temperature: float) -> Tensor:
    """Cosines of every item with the others over the temperature, ``[I, I - 1]``."""
    unit_IE = F.normalize(x_IE, dim=1)
    count = len(unit_IE)
    others = torch.tensor(
        [[j for j in range(count) if j != i] for i in range(count)], device=x_IE.device, dtype=torch.int64
    )
    return (unit_IE @ unit_IE.T / temperature).gather(1, others)


def teachers_of(objectives: Iterable[Any]) -> dict[str, set[Pass]]:
    """Teachers that objectives learn from, and the passes that they need of each."""
    found: dict[str, set[Pass]] = {}
    for entry in objectives:
        if isinstance(entry.config, Distill):
            found.setdefault(entry.config.teacher, set()).add(entry.config.needs)
    return found
