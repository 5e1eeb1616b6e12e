"""How the next token is drawn from logits.

Shape legend: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from polymodal.core.config import Config
from polymodal.core.errors import CheckpointError


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

    @model_validator(mode="after")
    def _narrows_a_draw(self) -> Self:
        if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
            raise ValueError(
                f"found top_k {self.top_k} and top_p {self.top_p} with temperature 0, which takes the most probable "
                "token whatever they say; expected a temperature above 0, such as 1"
            )
        return self


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The next token of each row, int64 ``[B]``.

    Raises:
        CheckpointError: if a logit is no number.
    """
    if bool(logits_BV.isnan().any()):
        raise CheckpointError(
            "found logits that are no numbers (NaN), expected numbers: the weights are damaged, or float16 overflows; "
            "fetch the checkpoint again, or load it with weights='fp32'"
        )
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
