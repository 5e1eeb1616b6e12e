"""Features that are tokens as they are. Legend: ``U`` units, ``N`` features, ``D`` width."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.connectors.base import Connector, ConnectorConfig, masked


class IdentityConfig(ConnectorConfig):
    """No map at all, where the encoder's width is the backbone's (ViLT, BLIP)."""

    use: Literal["identity"] = "identity"

    def num_tokens(self, num_features: int) -> int:
        """One for each feature."""
        return num_features

    def build(self, in_dim: int, out_dim: int) -> Connector:
        """The module.

        Raises:
            ConfigError: if the widths differ.
        """
        if in_dim != out_dim:
            raise ConfigError(
                f"connector identity: found an encoder of width {in_dim} before a backbone that takes {out_dim}, "
                "expected equal widths; use linear"
            )
        return Identity()


class Identity(Connector):
    """See :class:`IdentityConfig`."""

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Connector.forward`."""
        return masked(x_UND, is_valid_UN), is_valid_UN
