"""The recipe: one declarative file that is the whole model, its training and its evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from polymodal.core.config import Config, unknown
from polymodal.core.limits import Limits
from polymodal.models.compose.config import ModelConfig
from polymodal.models.compose.model import supports
from polymodal.training.precision import ComputeConfig
from polymodal.training.stage import StageConfig


class Recipe(Config):
    """A complete run."""

    name: str
    model: ModelConfig
    stages: tuple[StageConfig, ...] = ()
    evaluate: tuple[dict[str, Any], ...] = ()
    """Evaluation tasks, run after the last stage."""
    data_root: str = "."
    """Folder that data paths start from; relative to where the command runs."""
    seed: int = 0
    precision: ComputeConfig = ComputeConfig()
    limits: Limits = Limits()
    overflow: Literal["refuse", "cut_text"] = "refuse"
    """What happens to samples longer than the backbone's ``max_tokens``."""
    max_bad_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Share of unusable samples above which a run stops."""
    keep_last: PositiveInt = 2
    """Checkpoints kept besides the best."""
    tensorboard: bool = False
    """Write TensorBoard logs into the run folder (extra ``log``)."""

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: found the names {names}, expected each once")
        can = supports(self.model)
        for stage in self.stages:
            for name, _, objective in stage.parsed_objectives():
                if objective.needs not in can:
                    raise ValueError(
                        f"stage {stage.name!r}: objective {name!r} needs the pass {objective.needs!r}, "
                        f"which this model cannot run; {unknown('pass', objective.needs, sorted(can))}"
                    )
        return self

    def stage(self, name: str) -> StageConfig:
        """The stage called ``name``."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
