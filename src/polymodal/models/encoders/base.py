"""What every encoder is: model input of one modality -> features.

Legend: ``U`` units, ``N`` features of a unit, ``D`` width, ``L`` length of a unit. ``is_valid``: True on features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.modalities.reader import ReaderConfig
from polymodal.models.layers import Activation, TransformerConfig

Pool = Literal["mean", "max"]
"""How valid features become one vector, per channel."""


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder gives for a batch of units.

    Args:
        x_UND: features; zero where not valid.
        is_valid_UN: bool; the valid features of a unit come first, and their number is the config's ``num_features``.
        pooled_UD: one vector for each unit: the mean of its valid features unless the encoder says otherwise.
        penalty: scalar that an ``orthogonality`` objective may add; None for most encoders.
    """

    x_UND: Tensor
    is_valid_UN: Tensor
    pooled_UD: Tensor
    penalty: Tensor | None = None


class EncoderConfig(Config, ABC):
    """Base of the encoder configs; a variant adds ``use`` and its own fields."""

    modality: ClassVar[str]
    width: int = Field(default=128, ge=4)
    """Width of the features."""

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        return self.width

    @property
    @abstractmethod
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of one unit without its ragged axis, as the reader's ``unit_shape``."""

    @abstractmethod
    def num_features(self, length: int) -> int:
        """How many features a unit of this length (at least 1) becomes; exact."""

    @abstractmethod
    def default_reader(self) -> ReaderConfig:
        """The reader whose units this encoder takes."""

    @abstractmethod
    def build(self) -> Encoder:
        """The module, with new random weights."""


class TransformerEncoderConfig(EncoderConfig, ABC):
    """Base of the encoders that end in a transformer."""

    depth: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp_dim: int | None = Field(default=None, ge=1)
    """Hidden width of the MLPs; None: 4 x width."""
    activation: Activation = "gelu"
    norm_eps: float = Field(default=1e-5, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config, with another depth where one is given."""
        return TransformerConfig.parse(
            {
                "width": self.width,
                "depth": self.depth if depth is None else depth,
                "heads": self.heads,
                "mlp_dim": self.mlp_dim,
                "activation": self.activation,
                "norm_eps": self.norm_eps,
                "dropout": self.dropout,
                "final_norm": final_norm,
            }
        )

    @model_validator(mode="after")
    def _stack_is_possible(self) -> Self:
        self.stack()
        if self.width % 2:
            raise ValueError(f"found width {self.width}, expected an even number")
        return self


class Encoder(nn.Module, ABC):
    """Base of the encoders; padding of a batch never changes a valid feature."""

    config: EncoderConfig

    @abstractmethod
    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode units.

        Args:
            values: ``[U, ...]`` float32 (int64 for text), zero-padded along the ragged axis.
            lengths_U: int64 valid lengths.

        Raises:
            ConfigError: if the units do not have the shape that the config states.
        """

    @property
    def dtype(self) -> torch.dtype:
        """The number format of its weights, in which it reads media; float32 where it has none."""
        formats = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return next(formats, torch.float32)

    def codes(self, values: Tensor, lengths_U: Tensor) -> Tensor:
        """The discrete code of each feature, int64 ``[U, N]``: its largest value, for encoders that are codecs."""
        features: Features = self(values, lengths_U)
        return features.x_UND.argmax(-1)

    def normed(self, features: Features) -> Tensor:
        """Features as heads read them ``[U, N, D]``: normalised also where the encoder hands them on unnormalised."""
        return features.x_UND

    def require_shape(self, values: Tensor, ragged: bool = True) -> None:
        """Prove that units have the stated shape.

        Raises:
            ConfigError: if they do not.
        """
        found, expected = tuple(values.shape[2 if ragged else 1 :]), self.config.unit_shape
        if found != expected:
            raise ConfigError(
                f"{type(self).__name__}: found units of shape {found}, expected {expected}; "
                "make the encoder's config and its reader's agree"
            )


def finish(x_UND: Tensor, is_valid_UN: Tensor, pooled_UD: Tensor | None = None) -> Features:
    """Zero what is not valid and pool by the mean unless a pooled vector is given."""
    if bool(is_valid_UN.all()):
        return Features(x_UND, is_valid_UN, x_UND.mean(dim=1) if pooled_UD is None else pooled_UD)
    x_UND = x_UND.masked_fill(~is_valid_UN[..., None], 0.0)
    if pooled_UD is None:
        pooled_UD = x_UND.sum(dim=1) / is_valid_UN.sum(dim=1, keepdim=True).clamp(min=1)
    return Features(x_UND, is_valid_UN, pooled_UD)


def pool_max(x_UND: Tensor, is_valid_UN: Tensor) -> Tensor:
    """The largest value of each channel over valid features ``[U, D]``; zeros for a unit without any."""
    least = torch.finfo(x_UND.dtype).min
    pooled_UD = x_UND.masked_fill(~is_valid_UN[..., None], least).amax(dim=1)
    return pooled_UD.masked_fill(~is_valid_UN.any(dim=1, keepdim=True), 0.0)


def all_valid(x_UND: Tensor, pooled_UD: Tensor | None = None) -> Features:
    """Features of units that are never ragged."""
    is_valid_UN = torch.ones(x_UND.shape[:2], dtype=torch.bool, device=x_UND.device)
    return Features(x_UND, is_valid_UN, x_UND.mean(dim=1) if pooled_UD is None else pooled_UD)
