"""Compose: one model out of streams, a backbone and heads."""

from polymodal.models.compose.config import ModelConfig, StreamConfig, TokenizerConfig
from polymodal.models.compose.model import MultimodalModel
from polymodal.models.compose.move import to_device

__all__ = ["ModelConfig", "MultimodalModel", "StreamConfig", "TokenizerConfig", "to_device"]
