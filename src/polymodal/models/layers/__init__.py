"""The one transformer stack that every encoder, connector and backbone is configured from."""

from polymodal.models.layers.attention import Attention, AttentionExtras
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory
from polymodal.models.layers.mlp import MLP, Activation
from polymodal.models.layers.norm import NormKind, build_norm
from polymodal.models.layers.positions import LearnedPositions, grid_codes, sincos_2d, sinusoidal
from polymodal.models.layers.rope_scaling import RopeScaling
from polymodal.models.layers.transformer import Block, Transformer, TransformerConfig, initialise

__all__ = [
    "MLP",
    "Activation",
    "Attention",
    "AttentionExtras",
    "Block",
    "KVCache",
    "Layout",
    "LearnedPositions",
    "Memory",
    "NormKind",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "build_norm",
    "grid_codes",
    "initialise",
    "sincos_2d",
    "sinusoidal",
]
