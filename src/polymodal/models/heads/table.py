"""Every head by name: states -> what is asked for."""

from __future__ import annotations

from polymodal.core.config import Table
from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.heads.classes import ClassConfig
from polymodal.models.heads.ctc import CtcConfig
from polymodal.models.heads.latent_queries import QueryTokenConfig
from polymodal.models.heads.masked_patches import MaskedPatchesConfig
from polymodal.models.heads.masked_token import MaskedTokenConfig, MaskedTokenHead
from polymodal.models.heads.matching import MatchingConfig, MatchingHead
from polymodal.models.heads.next_token import NextTokenConfig, NextTokenHead
from polymodal.models.heads.pooler import PoolerConfig
from polymodal.models.heads.projection import ProjectionConfig, ProjectionHead
from polymodal.models.heads.prompted_pairs import PromptedPairsConfig

__all__ = [
    "HEADS",
    "ClassConfig",
    "HeadConfig",
    "HeadInputs",
    "MaskedTokenConfig",
    "MaskedTokenHead",
    "MatchingConfig",
    "MatchingHead",
    "NextTokenConfig",
    "NextTokenHead",
    "ProjectionConfig",
    "ProjectionHead",
]


HEADS: Table[HeadConfig] = Table(
    "head",
    [
        NextTokenConfig,
        ProjectionConfig,
        ClassConfig,
        MatchingConfig,
        CtcConfig,
        MaskedPatchesConfig,
        PromptedPairsConfig,
        QueryTokenConfig,
        MaskedTokenConfig,
        PoolerConfig,
    ],
)
"""Every head by name."""
