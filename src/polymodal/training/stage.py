"""One stage of a recipe: what trains, on which data, with which objectives, for how long."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from polymodal.core.config import Config
from polymodal.data.planner import BatchSpec
from polymodal.data.selection import DescribedSource, ModalitySource
from polymodal.data.sources import JsonlSource, open_source
from polymodal.objectives.distill import teachers_of
from polymodal.objectives.table import WeightedObjective, parse_objectives
from polymodal.training.freezing import TrainEntry
from polymodal.training.optimizers import OPTIMIZERS
from polymodal.training.pruning import PruneConfig
from polymodal.training.schedules import SCHEDULES


class DataEntry(Config):
    """One source of a stage's mix."""

    path: str
    """A JSON Lines file of samples; relative paths start at the recipe's ``data_root``."""
    weight: PositiveFloat = 1.0
    """Its share of the samples drawn, relative to the other entries."""
    modalities: tuple[str, ...] | None = None
    """Only samples all of whose media are of these modalities; None: all samples."""
    as_views: bool = False
    """Whether conversations of one question about one medium are read as view sets: the medium, and the answer as its
    text."""

    def open(self, root: str | os.PathLike[str]) -> JsonlSource | ModalitySource | DescribedSource:
        """The source; relative paths start from ``root``.

        Raises:
            DataError: if there is none, or nothing of it is selected.
        """
        source = open_source(Path(root) / self.path)
        chosen = source if self.modalities is None else ModalitySource(source, self.modalities)
        return DescribedSource(chosen) if self.as_views else chosen


def _named(value: Any, key: str) -> Any:
    """A bare string stands for the entry that names only it."""
    return [{key: item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


class StageConfig(Config):
    """One stage."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Its name in folders and reports: letters, digits, ``_``, ``-`` and ``.``."""
    train: tuple[TrainEntry, ...]
    """What trains: paths, patterns, or entries with an adapter; all else is frozen."""
    data: tuple[DataEntry, ...]
    """Where samples come from."""
    copy_weights: dict[str, str] = Field(default_factory=dict)
    """Part -> another part, whose weights of the same names and shapes it starts this stage with (a video encoder from
    an image encoder of the same widths: inflation)."""
    fit_codes: dict[str, PositiveInt] = Field(default_factory=dict)
    """Stream with a ``quantised`` encoder -> how many of its items are read before this stage starts, to fit the
    centres to what the frozen encoder makes of them (k-means)."""
    objectives: dict[str, Any]
    """Objective name -> weight, or a mapping of its options with ``weight``."""
    batch: BatchSpec
    """How samples become batches."""
    steps: PositiveInt
    """Updates of the optimizer."""
    optimizer: OPTIMIZERS.field() = Field(default_factory=lambda: OPTIMIZERS.parse("adamw"))  # type: ignore[valid-type]
    """The rule of the updates."""
    schedule: SCHEDULES.field() = Field(default_factory=lambda: SCHEDULES.parse("cosine"))  # type: ignore[valid-type]
    """The learning rate over the steps."""
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
    prune: PruneConfig | None = None
    """Set the smallest weights of this stage to zero, step by step."""
    save_every: PositiveInt = 500
    """Steps between checkpoints, from which an interrupted run goes on."""
    eval_every: PositiveInt | None = None
    """Steps between losses on ``validation``; there is one after the last step too."""
    validation: str | None = None
    """A JSON Lines file; the stage ends with the weights whose loss on it is the lowest."""

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
        needs = {entry.config.needs for entry in objectives}
        if len({"match", "match_any", "match_hard"} & needs) > 1:
            raise ValueError(f"stage {self.name!r}: found several kinds of negatives of matching, expected one kind")
        if self.grad_cache and any(entry.config.twin is not None for entry in objectives):
            raise ValueError(f"stage {self.name!r}: grad_cache does without a queue; leave momentum_contrast out")
        if (self.grad_cache or self.cache_features) and teachers_of(objectives):
            raise ValueError(f"stage {self.name!r}: a teacher reads the media; leave grad_cache and cache_features out")
        if self.prune is not None and self.validation is not None:
            raise ValueError(
                f"stage {self.name!r}: 'validation' could choose weights from before 'prune' was done; leave one out"
            )
        if (self.eval_every is None) != (self.validation is None):
            raise ValueError(f"stage {self.name!r}: 'eval_every' and 'validation' belong together")
        return self

    def parsed_objectives(self) -> list[WeightedObjective]:
        """The objectives as callables with weights."""
        return parse_objectives(self.objectives, f"stages.{self.name}.objectives")
