"""What an objective is: the pass that it needs, and a pure function from a model's outputs to a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.core.passes import Pass

__all__ = ["LossReport", "ObjectiveConfig", "Pass", "TwinNeed", "required", "wide"]

T = TypeVar("T")


@dataclass(slots=True)
class LossReport:
    """One objective's loss on one batch.

    Args:
        total: scalar float32 tensor to differentiate. Where ``count`` is 0 it is a plain zero without a graph, so that
            an absent modality's parameters keep the gradient None and are left alone by the optimizer.
        parts: detached scalar per modality or per pair of streams, for the log.
        count: how many things ``total`` is the mean over (tokens, samples or pairs); 0 if the batch holds none.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    count: float = 0


class TwinNeed(NamedTuple):
    """The momentum twin that an objective needs in training.

    Args:
        decay: of its weights, per step; queue: vectors of each stream of the shared space that are kept.
        passes: what it runs.
    """

    decay: float
    queue: int
    passes: tuple[Pass, ...] = ("embed",)


class ObjectiveConfig(Config):
    """Base of the objectives: a config that is called with the outputs and the batch."""

    needs: ClassVar[Pass]

    @property
    def twin(self) -> TwinNeed | None:
        """The momentum twin that it needs in training; None for most."""
        return None

    def __call__(self, outputs: Outputs, batch: Batch) -> LossReport:
        """The loss of one batch."""
        raise NotImplementedError

    def count(self, batch: Batch) -> float:
        """How many things the loss of ``batch`` is the mean over, known before the forward pass: what it weighs by.

        A mean over several batches with these weights is the mean over all of them as one. Losses that compare samples
        with each other count samples; over several batches they are not the same as over one.
        """
        return batch.num_samples

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that the config names, which a recipe must have."""
        return ()


def required(value: T | None, objective: str, what: str, head: str) -> T:
    """``value``, which ``objective`` reads from the outputs.

    Raises:
        ConfigError: if it is None; says which head fills it.
    """
    if value is None:
        raise ConfigError(f"objective {objective}: the outputs have no {what}; add {head} to the model's heads")
    return value


def wide(x: Tensor) -> Tensor:
    """``x`` in at least float32: losses are not computed in half precision."""
    return x if x.element_size() >= 4 else x.float()
