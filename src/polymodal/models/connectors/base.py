"""What every connector is: features of a unit -> tokens, their number known before it runs.

Legend: ``U`` units, ``N`` features, ``M`` tokens, ``D`` width. ``is_valid``: True on features and tokens, valid first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError


class ConnectorConfig(Config, ABC):
    """Base of the connector configs; a variant adds ``use`` and its own fields."""

    @abstractmethod
    def num_tokens(self, num_features: int) -> int:
        """How many tokens a unit of this many features becomes; exact.

        Raises:
            ConfigError: if the connector cannot take that many features.
        """

    def width_for(self, out_dim: int) -> int:
        """Width of the tokens before a backbone of width ``out_dim``; another than that only a memory can have."""
        return out_dim

    @abstractmethod
    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module, with new random weights, from features of ``in_dim`` to tokens of ``out_dim``."""


class Connector(nn.Module, ABC):
    """Base of the connectors; padding of a batch never changes a valid token."""

    @abstractmethod
    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """Connect features.

        Args:
            x_UND: features of width ``in_dim``; the valid ones of a unit come first.
            is_valid_UN: bool.

        Returns:
            Tokens ``[U, M, out_dim]``, zero where not valid, and ``is_valid`` ``[U, M]``; the valid ones come first.
        """


def side_of(num_features: int, grid_features: int | None) -> int:
    """Side of the square grids that a unit's features form.

    Args:
        num_features: of the unit.
        grid_features: of one grid, where a unit holds several (frames of a video); None: all features are one grid.

    Raises:
        ConfigError: if they do not form square grids.
    """
    size = num_features if grid_features is None else grid_features
    side = math.isqrt(size)
    if side * side != size:
        raise ConfigError(
            f"found {size} features, expected a square grid such as {side * side}; for several grids in one unit "
            "(frames of a video) set grid_features to the features of one"
        )
    if size and num_features % size:
        raise ConfigError(f"found {num_features} features, expected a multiple of grid_features {size}")
    return side


def split_by_count(is_valid_UN: Tensor) -> list[tuple[int, Tensor]]:
    """Units grouped by their number of valid features: ``(count, unit indices)``, without empty units.

    Grids of different sizes cannot be one tensor; units of equal size are handled together.
    """
    counts_U = is_valid_UN.sum(dim=1)
    return [(count, (counts_U == count).nonzero()[:, 0]) for count in sorted(set(counts_U.tolist())) if count]


def merge_by_count(
    groups: list[tuple[Tensor, Tensor]], num_units: int, x_UND: Tensor, out_dim: int
) -> tuple[Tensor, Tensor]:
    """Put the tokens ``[u, m, D]`` of each group of units back in place, zero-padded to the longest.

    Args:
        groups: ``(unit indices, tokens)``.
        num_units: ``U``.
        x_UND: tells device and, where there is no group, dtype.
        out_dim: ``D`` of the tokens.
    """
    longest = max((tokens.shape[1] for _, tokens in groups), default=0)
    dtype = groups[0][1].dtype if groups else x_UND.dtype
    out_UMD = torch.zeros(num_units, longest, out_dim, dtype=dtype, device=x_UND.device)
    is_valid_UM = torch.zeros(num_units, longest, dtype=torch.bool, device=x_UND.device)
    for indices, tokens in groups:
        out_UMD[indices, : tokens.shape[1]] = tokens
        is_valid_UM[indices, : tokens.shape[1]] = True
    return out_UMD, is_valid_UM


def fixed_tokens(x_UMD: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of connectors whose number does not depend on the features; a unit without features has none."""
    is_valid_UM = is_valid_UN.any(dim=1, keepdim=True).expand(x_UMD.shape[:2])
    return masked(x_UMD, is_valid_UM), is_valid_UM


def masked(x_UMD: Tensor, is_valid_UM: Tensor) -> Tensor:
    """Zero where not valid."""
    return x_UMD.masked_fill(~is_valid_UM[..., None], 0.0)
