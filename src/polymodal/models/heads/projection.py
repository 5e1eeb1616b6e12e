"""The shared space. Shape legend: ``I`` items, ``D`` width, ``E`` embedding width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers.mlp import Activation, activate


class ProjectionConfig(HeadConfig):
    """A shared space: one projection per stream, unit length, and one temperature that stands apart.

    Source: Radford 2103.00020 sec. 2.3 (learned inverse temperature, at most 100); bias for sigmoid pairs: Zhai
    2303.15343 sec. 3.2.
    """

    use: Literal["projection"] = "projection"
    dim: PositiveInt = 128
    """Width of the shared space."""
    streams: tuple[str, ...] = ()
    """The streams in the space; empty for all."""
    identity: tuple[str, ...] = ()
    """Streams whose pooled vectors are in the space as they are; they need its width (SigLIP)."""
    shared: dict[str, str] = Field(default_factory=dict)
    """Streams that take another's projection (ImageBind's videos take that of images)."""
    through: tuple[str, ...] = ()
    """Streams whose vector is the backbone's state with that stream alone in it (the text of BLIP; both of BEiT-3),
    instead of the encoder's own pooled vector. With a Q-Former that reads texts, its states: of a text the first, of a
    picture those of all queries, the best of which counts (BLIP-2, arXiv 2301.12597, section 3.2)."""
    proj_bias: bool = False
    """Whether the projections have a bias (ALBEF, BLIP, FLAVA)."""
    hidden: Activation | None = None
    """The non-linearity between two linear maps with biases (CLAP: relu); None: a projection is one linear map."""
    output_scales: dict[str, PositiveFloat | None] = Field(default_factory=dict)
    """Scale of a stream's vectors, by which the similarities of every pair with it are multiplied: a number, or None
    for a learned one that starts at ``1 / temperature`` (ImageBind). There is no shared one beside them."""
    query_scales: bool = False
    """Whether each stream has a learned scale for the pairs that it is compared from (CLAP); a symmetric loss takes the
    geometric mean of the two."""
    temperature: PositiveFloat | None = 0.07
    """Start of the learned temperature; None: similarities are not scaled, and nothing is learned."""
    max_scale: PositiveFloat | None = 100.0
    """Bound of the inverse temperature; None: none."""
    bias: float | None = 0.0
    """Start of the learned bias of sigmoid pairs (SigLIP: -10); None: no bias."""

    @model_validator(mode="after")
    def _identity_is_in(self) -> Self:
        outside = sorted(set(self.identity) - set(self.streams)) if self.streams else []
        if outside:
            raise ValueError(f"identity: {outside} are not among the streams {list(self.streams)}")
        return self

    @model_validator(mode="after")
    def _shared_is_in(self) -> Self:
        for name, other in self.shared.items():
            if other in self.shared or (self.streams and not {name, other} <= set(self.streams)):
                raise ValueError(f"shared: {name} takes the projection of {other}; expected a stream with its own")
        return self

    @model_validator(mode="after")
    def _scales_fit(self) -> Self:
        if self.query_scales and self.output_scales:
            raise ValueError("found both query_scales and output_scales, expected one of them")
        if self.temperature is None and (self.query_scales or None in self.output_scales.values()):
            raise ValueError("learned scales need a temperature to start from")
        if self.hidden is not None and self.proj_bias:
            raise ValueError("proj_bias is for projections of one linear map; those with 'hidden' have biases")
        return self

    def build(self, inputs: HeadInputs) -> ProjectionHead:
        """The head.

        Raises:
            ConfigError: if a stream is not in the model, or one of ``identity`` has another width.
        """
        named = {*self.streams, *self.identity, *self.through, *self.output_scales, *self.shared, *self.shared.values()}
        missing = sorted(named - set(inputs.stream_widths))
        if missing:
            raise ConfigError(
                f"head projection: streams {missing} are not in the model; its streams: {sorted(inputs.stream_widths)}"
            )
        for name in self.identity:
            if inputs.stream_widths[name] != self.dim:
                raise ConfigError(
                    f"head projection: stream {name!r} is to be in the space as it is, but its pooled vectors have "
                    f"width {inputs.stream_widths[name]}, the space {self.dim}"
                )
        names = self.streams or tuple(inputs.stream_widths)
        through = inputs.query_width or (self._width(inputs) if self.through else 0)
        widths = {name: through if name in self.through else inputs.stream_widths[name] for name in names}
        return ProjectionHead(self, widths)


class ProjectionHead(nn.Module):
    """Pooled vectors ``[I, D_enc]`` of one stream -> unit vectors ``[I, E]``."""

    log_scale: Tensor
    bias: Tensor

    def __init__(self, config: ProjectionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        self.projs = nn.ModuleDict({name: self._map(name, width) for name, width in widths.items()})
        for proj in self.projs.modules():
            if isinstance(proj, nn.Linear):
                nn.init.normal_(proj.weight, std=proj.in_features**-0.5)
                if proj.bias is not None:
                    nn.init.zeros_(proj.bias)
        for name, other in config.shared.items():
            if widths[name] != widths[other]:
                raise ConfigError(
                    f"head projection: the stream {name!r} has width {widths[name]}, expected {widths[other]} as "
                    f"{other!r}, whose projection it shares"
                )
            self.projs[name] = self.projs[other]
        start = None if config.temperature is None else math.log(1.0 / config.temperature)
        learned = [name for name in widths if config.query_scales or config.output_scales.get(name, 0) is None]
        self.log_scales = nn.ParameterDict({name: nn.Parameter(torch.tensor(start)) for name in learned})
        self._number("log_scale", None if self.has_own_scales else start)
        self._number("bias", config.bias)

    def _number(self, name: str, start: float | None) -> None:
        """A learned number, or a constant 0 that no checkpoint holds."""
        if start is None:
            self.register_buffer(name, torch.tensor(0.0), persistent=False)
        else:
            self.register_parameter(name, nn.Parameter(torch.tensor(start)))

    def forward(self, pooled_ID: Tensor, stream: str) -> Tensor:
        """Unit vectors ``[I, E]``, float32; of several states ``[I, M, D_enc]`` as many, ``[I, M, E]``."""
        return F.normalize(self.projs[stream](pooled_ID).float(), dim=-1)

    def _map(self, name: str, width: int) -> nn.Module:
        config = self.config
        if name in config.identity:
            return nn.Identity()
        if config.hidden is not None:
            return TwoMaps(width, config.dim, config.hidden)
        return nn.Linear(width, config.dim, bias=config.proj_bias)

    @property
    def scale(self) -> Tensor:
        """The shared inverse temperature, at most ``max_scale``."""
        return self._bounded(self.log_scale)

    @property
    def has_own_scales(self) -> bool:
        """Whether the scale depends on the pair of streams."""
        return self.config.query_scales or bool(self.config.output_scales)

    def pair_scale(self, first: str, second: str) -> Tensor:
        """What a loss multiplies the similarities of two streams by."""
        config = self.config
        if config.query_scales:
            return self._bounded((self.log_scales[first] + self.log_scales[second]) / 2)
        own = [self.output_scale(name) for name in (first, second) if name in config.output_scales]
        return math.prod(own[1:], start=own[0]) if own else self.scale

    def output_scale(self, stream: str) -> Tensor:
        """The scale of a stream's vectors, 1 where it has none."""
        if stream in self.log_scales:
            return self._bounded(self.log_scales[stream])
        return self.log_scale.new_tensor(self.config.output_scales.get(stream) or 1.0)

    def _bounded(self, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp()
        return scale if self.config.max_scale is None else scale.clamp(max=self.config.max_scale)


class TwoMaps(nn.Module):
    """Two linear maps with a non-linearity between. Source: CLAP, arXiv 2211.06687, section 2.1.

    Args:
        in_dim: width of the input.
        dim: of the output and of what is between.
        activation: the non-linearity.
    """

    def __init__(self, in_dim: int, dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.first = nn.Linear(in_dim, dim)
        self.second = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_dim]`` to ``[..., dim]``."""
        out: Tensor = self.second(activate(self.first(x), self.activation))
        return out
