"""Connectors: features of an encoder -> tokens of a backbone."""

from polymodal.models.connectors.base import Connector, ConnectorConfig
from polymodal.models.connectors.table import CONNECTORS

__all__ = ["CONNECTORS", "Connector", "ConnectorConfig"]
