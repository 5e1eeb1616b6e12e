"""How the next token is drawn from logits.

Shape legend: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from polymodal.core.config import Config


class Sampling(Config):
    """How one answer is drawn. The default is greedy."""

    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.0
    """0 takes the most probable token; 1 draws from the model's own distribution."""
    top_k: NonNegativeInt = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Keep the fewest most probable tokens whose probabilities reach p (Holtzman 1904.09751)."""
    seed: int | None = None
    """Makes a draw repeatable; None draws anew each time."""


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The next token of each row, int64 ``[B]``."""
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        # By place and not by value, so that equal logits cannot let more than k through.
        best, place = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1]), dim=-1)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(1, place, best)
    if sampling.top_p < 1.0:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # A token goes if those before it already reach p; the first always stays.
        is_out = probability.cumsum(dim=-1) - probability >= sampling.top_p
        logits_BV = logits_BV.masked_fill(is_out.scatter(1, order, is_out), -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator).squeeze(1)


def make_generator(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """The random source of one request."""
    if sampling.temperature == 0.0:
        return None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator
