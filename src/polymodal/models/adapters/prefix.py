"""Prefix tuning. Legend: ``N`` layers, ``G`` key-value heads, ``P`` virtual tokens, ``K`` head width."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from polymodal.models.adapters.base import Adapter
from polymodal.models.adapters.lora import like
from polymodal.models.adapters.virtual import AdaptedDecoder, KeyValues, VirtualConfig, VirtualTokens
from polymodal.models.backbones.decoder import Decoder


class PrefixConfig(VirtualConfig):
    """Trains keys and values of virtual tokens in every layer.

    Args:
        tokens: how many.
        std: deviation that they are drawn with.

    Source: prefix tuning, arXiv 2101.00190, section 4.2; without its reparametrisation by an MLP (section 4.3), as in
    P-tuning v2, arXiv 2110.07602, section 3.2.
    """

    use: Literal["prefix"] = "prefix"
    tokens: int = Field(default=20, ge=1)
    std: float = Field(default=0.02, ge=0)

    def build(self, module: nn.Module, path: str) -> Adapter:
        """See :class:`AdapterConfig`."""
        assert isinstance(module, Decoder)
        return Prefix(self, module)


class Prefix(VirtualTokens):
    """``keys [N, G, P, K]`` and ``values``; keys carry no rotary code."""

    config: PrefixConfig

    def __init__(self, config: PrefixConfig, decoder: Decoder) -> None:
        super().__init__(config)
        stack = decoder.config.transformer
        shape = (stack.depth, stack.num_kv_heads, config.tokens, stack.size_of_head)
        empty = like(next(decoder.transformer.parameters()))
        self.keys = nn.Parameter(empty.new_empty(shape).normal_(std=config.std))
        self.values = nn.Parameter(empty.new_empty(shape).normal_(std=config.std))

    def key_values(self, decoder: AdaptedDecoder, before: list[KeyValues]) -> list[KeyValues]:
        """See :class:`VirtualTokens`."""
        return [(keys[None], values[None]) for keys, values in zip(self.keys, self.values, strict=True)]
