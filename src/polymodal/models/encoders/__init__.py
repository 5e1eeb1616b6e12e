"""Encoders: model input of one modality -> features."""

from polymodal.models.encoders.base import Encoder, EncoderConfig, Features
from polymodal.models.encoders.table import ENCODERS

__all__ = ["ENCODERS", "Encoder", "EncoderConfig", "Features"]
