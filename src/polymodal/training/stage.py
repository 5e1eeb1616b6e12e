"""One stage of a recipe: what trains, on which data, with which objectives, for how long."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from polymodal.core.config import Config
from polymodal.data.planner import BatchSpec
from polymodal.objectives.table import WeightedObjective, parse_objectives
from polymodal.training.freezing import TrainEntry
from polymodal.training.optimizers import OPTIMIZERS
from polymodal.training.schedules import SCHEDULES


class DataEntry(Config):
    """One source of a stage's mix."""

    path: str
    """A JSON Lines file of samples; relative paths start at the recipe's ``data_root``."""
    weight: PositiveFloat = 1.0
    """Its share of the samples drawn, relative to the other entries."""


def _named(value: Any, key: str) -> Any:
    """A bare string stands for the entry that names only it."""
    return [{key: item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


class StageConfig(Config):
    """One stage."""

    name: str
    train: tuple[TrainEntry, ...]
    data: tuple[DataEntry, ...]
    objectives: dict[str, Any]
    """Objective name -> weight, or a mapping of its options with ``weight``."""
    batch: BatchSpec
    steps: PositiveInt
    optimizer: OPTIMIZERS.field() = Field(default_factory=lambda: OPTIMIZERS.parse("adamw"))  # type: ignore[valid-type]
    schedule: SCHEDULES.field() = Field(default_factory=lambda: SCHEDULES.parse("cosine"))  # type: ignore[valid-type]
    accumulate: PositiveInt = 1
    """Batches per optimizer step."""
    grad_cache: bool = False
    """The accumulated batches count as one for contrastive objectives, at the memory of one (Gao 2101.06983)."""
    clip: PositiveFloat | None = 1.0
    """Largest global gradient norm."""
    cache_features: bool = False
    """Keep the features of frozen encoders on disk, so that each media item is encoded once."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    save_every: PositiveInt = 500
    eval_every: PositiveInt | None = None
    """Steps between losses on ``validation``; the best is kept."""
    validation: str | None = None
    """A JSON Lines file; its loss decides which checkpoint is the best."""

    @field_validator("train", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return _named(value, "part")

    @field_validator("data", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return _named(value, "path")

    @model_validator(mode="after")
    def _agree(self) -> StageConfig:
        if not self.train or not self.data:
            raise ValueError(f"stage {self.name!r}: expected at least one entry in 'train' and in 'data'")
        objectives = self.parsed_objectives()
        if self.grad_cache and any(entry.config.needs != "embed" for entry in objectives):
            raise ValueError(f"stage {self.name!r}: grad_cache is for contrastive objectives alone")
        if (self.eval_every is None) != (self.validation is None):
            raise ValueError(f"stage {self.name!r}: 'eval_every' and 'validation' belong together")
        return self

    def parsed_objectives(self) -> list[WeightedObjective]:
        """The objectives as callables with weights."""
        return parse_objectives(self.objectives, f"stages.{self.name}.objectives")
