"""Learning-rate schedules: pure functions from the step to a factor of the peak rate."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from polymodal.core.config import Config, Table
from polymodal.core.errors import ConfigError


class ScheduleConfig(Config):
    """Base of the schedules.

    Args:
        warmup: steps of linear warm-up; below 1 a fraction of all steps, rounded up.
    """

    warmup: float = Field(default=0.0, ge=0)

    @field_validator("warmup")
    @classmethod
    def _fraction_or_whole(cls, warmup: float) -> float:
        if warmup >= 1 and warmup != int(warmup):
            raise ValueError(f"found {warmup}, expected a fraction below 1 or a whole number of steps")
        return warmup

    def warmup_steps(self, total: int) -> int:
        """Steps of warm-up in a run of ``total`` steps.

        Raises:
            ConfigError: if the warm-up is longer than the run.
        """
        steps = math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if steps > total:
            raise ConfigError(
                f"schedule {self.use_name}: warmup is {steps} steps, the stage has {total}; expected at most {total}, "
                "or a fraction below 1"
            )
        return steps

    @property
    def use_name(self) -> str:
        """The schedule's name in recipes."""
        return str(type(self).model_fields["use"].default)

    def factor(self, step: int, total: int) -> float:
        """The factor of the peak rate at update ``step`` (0 is the first) of ``total``.

        The first update of a warm-up of ``W`` steps has ``1 / W``, update ``W - 1`` has 1. Progress after it runs
        from 0 towards 1, which it would reach at update ``total``.
        """
        warmup = self.warmup_steps(total)
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(min(1.0, (step - warmup) / max(1, total - warmup)))

    def after_warmup(self, progress: float) -> float:
        """The factor at ``progress`` in [0, 1] of the steps after the warm-up."""
        raise NotImplementedError


class Constant(ScheduleConfig):
    """The peak rate throughout."""

    use: Literal["constant"] = "constant"

    def after_warmup(self, progress: float) -> float:
        """See :meth:`ScheduleConfig.after_warmup`."""
        return 1.0


class Linear(ScheduleConfig):
    """A straight line from 1 to ``min_ratio``."""

    use: Literal["linear"] = "linear"
    min_ratio: float = Field(default=0.0, ge=0, le=1)

    def after_warmup(self, progress: float) -> float:
        """See :meth:`ScheduleConfig.after_warmup`."""
        return 1.0 - (1.0 - self.min_ratio) * progress


class Cosine(ScheduleConfig):
    """Half a cosine from 1 to ``min_ratio``.

    Source: SGDR, arXiv 1608.03983, equation 5, one period.
    """

    use: Literal["cosine"] = "cosine"
    min_ratio: float = Field(default=0.0, ge=0, le=1)

    def after_warmup(self, progress: float) -> float:
        """See :meth:`ScheduleConfig.after_warmup`."""
        return self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: Table[ScheduleConfig] = Table("schedule", [Constant, Linear, Cosine])
