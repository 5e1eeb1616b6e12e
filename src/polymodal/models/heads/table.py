"""Heads: states -> what is asked for.

Shape legend: ``V`` vocabulary, ``I`` items, ``D`` width, ``E`` embedding width, ``S`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from polymodal.core.config import Config, Table
from polymodal.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What a head may need to know of the model it is built into.

    Args:
        state_width: width of the backbone's states; None without a backbone.
        vocab_size: size of the tokenizer.
        stream_widths: per stream, the width of its encoder.
        embedding: the backbone's token embedding, for tied heads.
    """

    state_width: int | None
    vocab_size: int
    stream_widths: Mapping[str, int]
    embedding: nn.Embedding | None


class HeadConfig(Config):
    """Base of the head configs."""

    use: str

    def build(self, inputs: HeadInputs) -> nn.Module:
        """The head, with random weights."""
        raise NotImplementedError

    def _width(self, inputs: HeadInputs) -> int:
        if inputs.state_width is None:
            raise ConfigError(f"head {self.use}: needs the states of a backbone, and the backbone is 'none'")
        return inputs.state_width


class NextTokenConfig(HeadConfig):
    """Logits over the vocabulary; ``tied`` shares the matrix with the token embedding (Press 1608.05859)."""

    use: Literal["next_token"] = "next_token"
    tied: bool = True

    def build(self, inputs: HeadInputs) -> NextTokenHead:
        """The head; needs a decoder backbone."""
        if inputs.embedding is None:
            raise ConfigError("head next_token: needs a decoder backbone, whose token states it reads")
        return NextTokenHead(inputs.embedding, self.tied)


class NextTokenHead(nn.Module):
    """States ``[..., D]`` -> logits ``[..., V]``."""

    def __init__(self, embedding: nn.Embedding, tied: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
        nn.init.normal_(self.proj.weight, std=embedding.embedding_dim**-0.5)
        if tied:
            self.proj.weight = embedding.weight

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[..., V]``."""
        logits: Tensor = self.proj(states)
        return logits


class ProjectionConfig(HeadConfig):
    """A shared space: one projection per stream, unit length, and one temperature that stands apart.

    Source: Radford 2103.00020 sec. 2.3 (learned inverse temperature, at most 100); bias for sigmoid pairs: Zhai
    2303.15343 sec. 3.2.
    """

    use: Literal["projection"] = "projection"
    dim: PositiveInt = 128
    streams: tuple[str, ...] = ()
    """The streams in the space; empty for all."""
    temperature: PositiveFloat = 0.07
    max_scale: PositiveFloat = 100.0
    bias: float = 0.0
    """Start of the learned bias of sigmoid pairs (SigLIP: -10)."""

    def build(self, inputs: HeadInputs) -> ProjectionHead:
        """The head; a stream that is not there is an error."""
        missing = sorted(set(self.streams) - set(inputs.stream_widths))
        if missing:
            raise ConfigError(
                f"head projection: streams {missing} are not in the model; its streams: {sorted(inputs.stream_widths)}"
            )
        names = self.streams or tuple(inputs.stream_widths)
        return ProjectionHead(self, {name: inputs.stream_widths[name] for name in names})


class ProjectionHead(nn.Module):
    """Pooled vectors ``[I, D_enc]`` of one stream -> unit vectors ``[I, E]``."""

    def __init__(self, config: ProjectionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        projs = {name: nn.Linear(width, config.dim, bias=False) for name, width in widths.items()}
        for name, width in widths.items():
            nn.init.normal_(projs[name].weight, std=width**-0.5)
        self.projs = nn.ModuleDict(projs)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / config.temperature)))
        self.bias = nn.Parameter(torch.tensor(config.bias))

    def forward(self, pooled_ID: Tensor, stream: str) -> Tensor:
        """Unit vectors ``[I, E]``, float32."""
        return F.normalize(self.projs[stream](pooled_ID).float(), dim=-1)

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, at most ``max_scale``."""
        return self.log_scale.exp().clamp(max=self.config.max_scale)


class ClassConfig(HeadConfig):
    """A linear classifier on the merged state."""

    use: Literal["class"] = "class"
    classes: tuple[str, ...]
    """Names of the classes, in logit order; a sample's ``label`` is one of them."""

    @model_validator(mode="after")
    def _distinct(self) -> ClassConfig:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("expected at least two distinct class names")
        return self

    def build(self, inputs: HeadInputs) -> nn.Module:
        """``[S, D] -> [S, C]``."""
        return nn.Linear(self._width(inputs), len(self.classes))


class MatchingConfig(HeadConfig):
    """One logit: do the views belong together? (ALBEF 2107.07651 sec. 3.2)."""

    use: Literal["matching"] = "matching"

    def build(self, inputs: HeadInputs) -> nn.Module:
        """``[S, D] -> [S, 1]``."""
        return nn.Linear(self._width(inputs), 1)


HEADS: Table[HeadConfig] = Table("head", [NextTokenConfig, ProjectionConfig, ClassConfig, MatchingConfig])
"""Every head by name."""
