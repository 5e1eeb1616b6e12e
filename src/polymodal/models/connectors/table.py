"""Every connector by name."""

from __future__ import annotations

from polymodal.core.config import Table
from polymodal.models.connectors.arrangements import ArrangementConfig, PooledFramesConfig, TileRowsConfig
from polymodal.models.connectors.base import ConnectorConfig
from polymodal.models.connectors.identity import IdentityConfig
from polymodal.models.connectors.perceiver import PerceiverConfig
from polymodal.models.connectors.pooling import PixelShuffleConfig, PoolConfig
from polymodal.models.connectors.projections import LinearConfig, MLPConfig
from polymodal.models.connectors.qformer import QFormerConfig
from polymodal.models.connectors.temporal import TemporalAttentionConfig, TemporalLstmConfig

CONNECTORS: Table[ConnectorConfig] = Table(
    "connector",
    [
        LinearConfig,
        IdentityConfig,
        MLPConfig,
        PoolConfig,
        PixelShuffleConfig,
        QFormerConfig,
        PerceiverConfig,
        TemporalAttentionConfig,
        TemporalLstmConfig,
    ],
)
"""Every connector config by name."""

ARRANGEMENTS: Table[ArrangementConfig] = Table("arrangement", [TileRowsConfig, PooledFramesConfig])
"""Every arrangement config by name."""
