"""Backbones: where streams meet."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from polymodal.core.config import Config, Table
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.backbones.encoder_decoder import EncoderDecoderConfig
from polymodal.models.backbones.latent import LatentConfig
from polymodal.models.backbones.transformers_decoder import TransformersDecoderConfig


class MergeConfig(Config):
    """Streams are merged into one state per sample by a fusion (``entries.fusions``).

    Every merged stream's connector gives tokens of ``width``; the fusion combines them.
    """

    use: Literal["merge"] = "merge"
    width: PositiveInt = 128
    fusion: dict[str, object] | str = "gated"
    """A fusion: its name, or a mapping with ``use``; parsed against the table of fusions when the model is built."""


class NoBackboneConfig(Config):
    """Streams meet only in objectives; their encoders, connectors and the projection head are the whole model."""

    use: Literal["none"] = "none"


BACKBONES: Table[Config] = Table(
    "backbone",
    [
        EncoderBackboneConfig,
        DecoderConfig,
        EncoderDecoderConfig,
        TransformersDecoderConfig,
        MergeConfig,
        LatentConfig,
        NoBackboneConfig,
    ],
)
"""Every backbone by name."""
