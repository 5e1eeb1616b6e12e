"""Prompt tuning. Legend: ``P`` virtual tokens, ``D`` width."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from polymodal.models.adapters.base import Adapter
from polymodal.models.adapters.lora import like
from polymodal.models.adapters.virtual import AdaptedDecoder, KeyValues, VirtualConfig, VirtualTokens
from polymodal.models.backbones.decoder import Decoder


class PromptConfig(VirtualConfig):
    """Trains the embeddings of virtual tokens that stand before every sequence.

    Args:
        tokens: how many.
        init: from embeddings of the vocabulary drawn at random, or from a Gaussian of their spread.

    Source: prompt tuning, arXiv 2104.08691, sections 2 and 2.1.
    """

    use: Literal["prompt"] = "prompt"
    tokens: int = Field(default=20, ge=1)
    init: Literal["vocabulary", "gaussian"] = "vocabulary"

    def build(self, module: nn.Module, path: str) -> Adapter:
        """See :class:`AdapterConfig`."""
        assert isinstance(module, Decoder)
        return Prompt(self, module)


class Prompt(VirtualTokens):
    """``prompt [P, D]``."""

    config: PromptConfig

    def __init__(self, config: PromptConfig, decoder: Decoder) -> None:
        super().__init__(config)
        table_VD = decoder.embed_tokens.weight.detach()
        self.prompt = nn.Parameter(like(table_VD).new_empty(config.tokens, decoder.config.width))
        with torch.no_grad():
            if config.init == "vocabulary":
                ids_P = torch.randint(len(table_VD), (config.tokens,), device=table_VD.device)
                self.prompt.copy_(decoder.embed_tokens(ids_P))
            else:
                self.prompt.normal_(std=float(table_VD.float().std()))

    def key_values(self, decoder: AdaptedDecoder, before: list[KeyValues]) -> list[KeyValues]:
        """See :class:`VirtualTokens`."""
        return decoder.read_virtual(self.prompt[None], before)
