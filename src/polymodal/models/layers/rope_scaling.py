"""Rotary codes stretched to longer texts than a model was first trained on."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from polymodal.core.config import Config


class RopeScaling(Config):
    """How the turning rates of a rotary code are slowed down.

    ``linear`` divides all of them by ``factor`` (arXiv 2306.15595, section 2.2). ``llama3`` divides those that turn
    less than ``low_freq_factor`` times within ``original_max_tokens``, keeps those that turn more than
    ``high_freq_factor`` times, and blends in between (Llama 3.1, arXiv 2407.21783, section 3.4.2, and its code).
    """

    kind: Literal["linear", "llama3"]
    """Which of the two ways."""
    factor: float = Field(ge=1.0)
    """By how much rates are slowed."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """For ``llama3``: turns below which a rate is slowed in full."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """For ``llama3``: turns above which a rate is kept."""
    original_max_tokens: PositiveInt = 8192
    """For ``llama3``: the longest sequence before scaling."""

    def slow(self, rates_K: Tensor) -> Tensor:
        """The rates in radians per token, slowed down."""
        if self.kind == "linear":
            return rates_K / self.factor
        turns_K = rates_K * (self.original_max_tokens / (2 * math.pi))
        share_K = (turns_K - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(rates_K / self.factor, rates_K, share_K.clamp(0.0, 1.0))
