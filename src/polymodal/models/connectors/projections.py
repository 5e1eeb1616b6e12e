"""Connectors that map each feature alone. Legend: ``U`` units, ``N`` features, ``D`` width."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from polymodal.models.connectors.base import Connector, ConnectorConfig, masked
from polymodal.models.layers import Activation, initialise
from polymodal.models.layers.mlp import activate


class LinearConfig(ConnectorConfig):
    """One linear map. Source: LLaVA, arXiv 2304.08485, section 4.1."""

    use: Literal["linear"] = "linear"

    def num_tokens(self, num_features: int) -> int:
        """One for each feature."""
        return num_features

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module."""
        return Projection(MLPStack(in_dim, out_dim, 1))


class MLPConfig(ConnectorConfig):
    """Linear maps with a non-linearity between. Source: LLaVA-1.5, arXiv 2310.03744, section 3.2 (depth 2, gelu)."""

    use: Literal["mlp"] = "mlp"
    depth: int = Field(default=2, ge=1)
    """Linear maps; all but the first are square."""
    activation: Activation = "gelu"

    def num_tokens(self, num_features: int) -> int:
        """One for each feature."""
        return num_features

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module."""
        return Projection(MLPStack(in_dim, out_dim, self.depth, self.activation))


class MLPStack(nn.Module):
    """``depth`` linear maps with activations between.

    Args:
        in_dim: width of the input.
        out_dim: width of the output and of what is between.
        depth: number of linear maps.
        activation: the non-linearity.
    """

    def __init__(self, in_dim: int, out_dim: int, depth: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.out_dim = out_dim
        widths = [in_dim] + [out_dim] * depth
        self.layers = nn.ModuleList(nn.Linear(inner, outer) for inner, outer in pairwise(widths))
        initialise(self, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_dim]`` to ``[..., out_dim]``."""
        for index, layer in enumerate(self.layers):
            x = layer(activate(x, self.activation) if index else x)
        return x


class Projection(Connector):
    """A map of each feature alone.

    Args:
        stack: the map.
    """

    def __init__(self, stack: MLPStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        return masked(self.stack(x_UND), is_valid_UN), is_valid_UN
