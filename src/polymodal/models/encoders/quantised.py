"""Visual words: the features of a frozen encoder, each replaced by the nearest of a table of centres.

Legend: ``U`` videos, ``N`` features, ``C`` width of the frozen encoder, ``K`` centres, ``D`` width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.reader import ReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, finish
from polymodal.models.encoders.masking import PatchMasking
from polymodal.models.layers import LearnedPositions, initialise
from polymodal.models.layers.convolution import valid_mask

_SMALL = {"use": "frame_temporal", "width": 32, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8}


class QuantisedConfig(EncoderConfig):
    """Discrete video tokens: a learned vector for each centre, and one for each place.

    The frozen encoder and the centres hold no parameters: nothing trains them. :meth:`Quantised.fit` sets the centres.

    Source: VideoBERT, arXiv 1904.01766, section 4.2 (12^4 centres of S3D features of 1.5 s clips, by hierarchical
    k-means).
    """

    use: Literal["quantised"] = "quantised"
    modality: ClassVar[str] = "video"
    base: dict[str, Any] = Field(default_factory=lambda: dict(_SMALL))
    """The frozen encoder, a video encoder's config."""
    branches: int = Field(default=4, ge=2)
    """Centres that each centre of the level above is parted into."""
    levels: int = Field(default=2, ge=1)
    """Levels; there are ``branches ** levels`` centres."""
    max_features: int = Field(default=64, ge=1)
    """Longest video in features of the frozen encoder."""
    mask_token: bool = False
    """Whether there is a learned vector for hidden places (masked modelling)."""

    @model_validator(mode="after")
    def _base_is_known(self) -> Self:
        if self.frozen.modality != self.modality:
            raise ValueError(f"base: found an encoder of {self.frozen.modality}, expected one of {self.modality}")
        return self

    @property
    def frozen(self) -> EncoderConfig:
        """The frozen encoder's config."""
        from polymodal.models.encoders.table import ENCODERS  # the table holds this class

        return ENCODERS.parse(self.base, "base")

    @property
    def num_codes(self) -> int:
        """``K``."""
        return int(self.branches**self.levels)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """That of the frozen encoder."""
        return self.frozen.unit_shape

    def num_features(self, length: int) -> int:
        """As many as the frozen encoder gives."""
        return int(self.frozen.num_features(length))

    def default_reader(self) -> ReaderConfig:
        """That of the frozen encoder."""
        return self.frozen.default_reader()

    def build(self) -> Quantised:
        """The module."""
        return Quantised(self)


class Quantised(PatchMasking):
    """See :class:`QuantisedConfig`."""

    config: QuantisedConfig
    centres_KC: Tensor

    def __init__(self, config: QuantisedConfig) -> None:
        super().__init__()
        self.config = config
        self.base = without_parameters(config.frozen.build())
        self.register_buffer("centres_KC", torch.randn(config.num_codes, config.frozen.width))
        self.code_embed = nn.Embedding(config.num_codes, config.width)
        initialise(self.code_embed, 1)
        self.positions = LearnedPositions(config.max_features, config.width)
        self.mask_token = nn.Parameter(torch.randn(config.width) * config.width**-0.5) if config.mask_token else None

    @torch.no_grad()
    def codes(self, values: Tensor, lengths_U: Tensor) -> Tensor:
        """The nearest centre of each feature, int64 ``[U, N]``; anything on padding."""
        self.base.eval()
        x_UNC = self.base(values, lengths_U).x_UND
        # The squared norm of a feature is the same for all centres, and left out.
        scores_UNK = 2 * x_UNC @ self.centres_KC.T - self.centres_KC.square().sum(1)
        codes_UN: Tensor = scores_UNK.argmax(-1)
        return codes_UN

    @torch.no_grad()
    def fit(self, x_NC: Tensor, seed: int = 0) -> None:
        """Set the centres to those of the frozen encoder's features of a corpus.

        Raises:
            ConfigError: if there are fewer features than centres.
        """
        self.centres_KC.copy_(hierarchical_means(x_NC, self.config.branches, self.config.levels, seed))

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Embed the codes of videos ``[U, L, 3, H, W]``."""
        return self._embed(values, lengths_U, None)

    def encode_masked(self, values: Tensor, lengths_U: Tensor, is_masked_UL: Tensor) -> Features:
        """See :class:`PatchMasking`."""
        if self.mask_token is None:
            raise ConfigError("encoder quantised: has no vector for hidden places; set mask_token: true")
        return self._embed(values, lengths_U, is_masked_UL)

    def _embed(self, values: Tensor, lengths_U: Tensor, is_masked_UN: Tensor | None) -> Features:
        self.require_shape(values)
        codes_UN = self.codes(values, lengths_U)
        x_UND = self.code_embed(codes_UN)
        if is_masked_UN is not None and self.mask_token is not None:
            x_UND = torch.where(is_masked_UN[..., None], self.mask_token.to(x_UND.dtype), x_UND)
        counts_U = torch.tensor([self.config.num_features(n) for n in lengths_U.tolist()], device=values.device)
        x_UND = x_UND + self.positions.first(codes_UN.shape[1])
        return finish(torch.as_tensor(x_UND), valid_mask(counts_U, codes_UN.shape[1]))

    @property
    def first_patch(self) -> int:
        """See :class:`PatchMasking`."""
        return 0

    def grids(self, values: Tensor, lengths_U: Tensor) -> list[tuple[int, int]]:
        """See :class:`PatchMasking`; one row, in time."""
        return [(1, self.config.num_features(length)) for length in lengths_U.tolist()]

    def patches(self, values: Tensor) -> Tensor:
        """See :class:`PatchMasking`.

        Raises:
            ConfigError: always; there are codes to predict and no pixels.
        """
        raise ConfigError("encoder quantised: has codes and no pixels to predict; set predicts: codes in the head")


def without_parameters(module: Encoder) -> Encoder:
    """The same module, its parameters turned into buffers: saved and moved with it, and out of reach of training."""
    for inner in module.modules():
        for name, parameter in list(inner._parameters.items()):
            if parameter is not None:
                del inner._parameters[name]
                inner.register_buffer(name, parameter.detach())
    return module


def hierarchical_means(x_NC: Tensor, branches: int, levels: int, seed: int = 0, steps: int = 10) -> Tensor:
    """Centres ``[branches ** levels, C]`` by k-means of each cluster of the level above, drawn from ``seed``.

    A cluster with fewer members than branches repeats them, so that the table keeps its size.

    Raises:
        ConfigError: if there are fewer features than branches.
    """
    if len(x_NC) < branches:
        raise ConfigError(f"k-means: found {len(x_NC)} features, expected at least {branches}")
    generator = torch.Generator().manual_seed(seed)
    clusters = [x_NC]
    for _ in range(levels):
        parts = []
        for members in clusters:
            centres = _means(members, branches, generator, steps)
            owner = torch.cdist(members, centres).argmin(1)
            own = [members[owner == place] for place in range(branches)]
            parts += [part if len(part) else centre[None] for part, centre in zip(own, centres, strict=True)]
        clusters = parts
    return torch.stack([members.mean(0) for members in clusters])


def _means(x_NC: Tensor, count: int, generator: torch.Generator, steps: int) -> Tensor:
    first = torch.randperm(len(x_NC), generator=generator)[:count]
    centres = x_NC[first[torch.arange(count) % len(first)]].clone()
    for _ in range(steps):
        owner = torch.cdist(x_NC, centres).argmin(1)
        for place in range(count):
            if bool((owner == place).any()):
                centres[place] = x_NC[owner == place].mean(0)
    return centres
