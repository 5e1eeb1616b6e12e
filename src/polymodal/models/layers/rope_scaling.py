"""Rotary codes stretched to longer texts than a model was first trained on.

Legend: ``K`` turning rates, half the width of a head.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from polymodal.core.config import Config

_OF_KIND = {
    "linear": set[str](),
    "llama3": {"low_freq_factor", "high_freq_factor", "original_max_tokens"},
    "yarn": {"beta_fast", "beta_slow", "truncate", "attention_factor", "original_max_tokens"},
    "longrope": {"short_factors", "long_factors", "attention_factor", "original_max_tokens"},
}


class RopeScaling(Config):
    """How the turning rates of a rotary code are slowed down.

    ``linear`` divides all of them by ``factor`` (arXiv 2306.15595, section 2.2). ``llama3`` divides those that turn
    less than ``low_freq_factor`` times within ``original_max_tokens``, keeps those that turn more than
    ``high_freq_factor`` times, and blends in between (Llama 3.1, arXiv 2407.21783, section 3.4.2, and its code).
    ``yarn`` does the same between ``beta_slow`` and ``beta_fast`` turns, blending by the number of the rate, and makes
    queries and keys longer (arXiv 2309.00071, sections 3.2 and 3.4). ``longrope`` divides each rate by a factor of its
    own, found by search, one set for texts up to ``original_max_tokens`` and one for longer ones (arXiv 2402.13753,
    section 3.3).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    """Which of the ways."""
    factor: float = Field(ge=1.0)
    """By how much rates are slowed; for ``longrope``, how much longer texts may be."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """For ``llama3``: turns below which a rate is slowed in full."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """For ``llama3``: turns above which a rate is kept."""
    beta_fast: PositiveFloat = 32.0
    """For ``yarn``: turns above which a rate is kept."""
    beta_slow: PositiveFloat = 1.0
    """For ``yarn``: turns below which a rate is slowed in full."""
    truncate: bool = True
    """For ``yarn``: whether the borders between the two are whole numbers of rates."""
    short_factors: tuple[PositiveFloat, ...] = ()
    """For ``longrope``: what each rate is divided by in texts up to ``original_max_tokens``."""
    long_factors: tuple[PositiveFloat, ...] = ()
    """For ``longrope``: and in longer ones. The longest row of a batch decides for all."""
    attention_factor: PositiveFloat | None = None
    """For ``yarn`` and ``longrope``: what queries and keys are multiplied by; None: as the papers derive it."""
    original_max_tokens: PositiveInt = 8192
    """For all but ``linear``: the longest sequence before scaling."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        given = self.model_fields_set - {"kind", "factor"} - _OF_KIND[self.kind]
        changed = sorted(name for name in given if getattr(self, name) != type(self).model_fields[name].default)
        if changed:
            raise ValueError(f"{changed[0]}: found for kind {self.kind!r}, which does not read it; leave it out")
        if self.kind == "longrope" and not 0 < len(self.short_factors) == len(self.long_factors):
            raise ValueError(
                f"longrope: found {len(self.short_factors)} short_factors and {len(self.long_factors)} long_factors, "
                "expected one of each for every pair of a head"
            )
        return self

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None or self.kind in ("linear", "llama3"):
            return self.attention_factor or 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_tokens))

    def slow(self, rates_K: Tensor, longest: int = 0) -> Tensor:
        """The rates in radians per token, slowed down for a text of ``longest`` tokens."""
        if self.kind == "linear":
            return rates_K / self.factor
        if self.kind == "longrope":
            factors = self.long_factors if longest > self.original_max_tokens else self.short_factors
            return rates_K / torch.tensor(factors, dtype=rates_K.dtype, device=rates_K.device)
        if self.kind == "yarn":
            return torch.lerp(rates_K, rates_K / self.factor, self._slowed_share(rates_K))
        turns_K = rates_K * (self.original_max_tokens / (2 * math.pi))
        share_K = (turns_K - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(rates_K / self.factor, rates_K, share_K.clamp(0.0, 1.0))

    def _slowed_share(self, rates_K: Tensor) -> Tensor:
        """YaRN's ramp over the numbers of the rates, 0 where a rate is kept; rates fall from 1 by a constant factor."""
        count = len(rates_K)
        if count < 2:
            return torch.ones_like(rates_K)
        fall = -math.log(float(rates_K[1]))

        def number(turns: float) -> float:
            """Of the rate that turns so often within the original length."""
            return math.log(self.original_max_tokens / (turns * 2 * math.pi)) / fall

        first, last = number(self.beta_fast), number(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * count - 1)
        steps_K = torch.arange(count, dtype=rates_K.dtype, device=rates_K.device)
        return ((steps_K - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
