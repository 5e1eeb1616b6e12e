"""Low-rank adapters on linear layers and embeddings.

Legend: ``...`` any leading axes, ``I`` inputs, ``O`` outputs, ``R`` rank, ``V`` ids.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from polymodal.models.adapters.base import Adapter, AdapterConfig, is_linear, plain


class LowRankConfig(AdapterConfig):
    """What LoRA and DoRA share.

    Args:
        rank: inner width of the update.
        alpha: numerator of its scale.
        dropout: probability of dropping an input of the update, not of the frozen path.
        rank_stabilised: scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``, so that updates of a high rank
            keep their size (rsLoRA, arXiv 2312.03732, section 4).
    """

    is_mergeable = True

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LoRAConfig(LowRankConfig):
    """Trains ``weight + scale * lora_b @ lora_a`` with ``weight`` frozen.

    Args:
        match: which linear layers; the default is all of them.
        embeddings: which embeddings besides, as paths or patterns; they have no dropout.

    Source: LoRA, arXiv 2106.09685, section 4.1. As in its reference code and unlike its text, ``lora_a`` starts
    uniform (Kaiming), not Gaussian; ``lora_b`` starts at zero; on embeddings it is the other way round.
    """

    use: Literal["lora"] = "lora"
    embeddings: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        """See :class:`AdapterConfig`."""
        return (*super().targets, *(("embeddings", pattern) for pattern in self.embeddings))

    def fits(self, module: nn.Module, field: str) -> bool:
        """Linear layers, and embeddings for ``embeddings``."""
        return plain(module) is nn.Embedding if field == "embeddings" else is_linear(module)

    def build(self, module: nn.Module, path: str) -> Adapter:
        """See :class:`AdapterConfig`."""
        return LoRA(self, module) if isinstance(module, nn.Linear) else EmbeddingLoRA(self, module)


class LowRank(Adapter):
    """The two factors: ``lora_a [R, I]`` and ``lora_b [O, R]``."""

    config: LowRankConfig
    asleep = ("lora_a",)

    def __init__(self, config: LowRankConfig, layer: nn.Module) -> None:
        super().__init__(config)
        assert isinstance(layer, nn.Linear)
        empty = like(layer.weight)
        self.lora_a = nn.Parameter(empty.new_empty(config.rank, layer.in_features))
        self.lora_b = nn.Parameter(empty.new_zeros(layer.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def product(self, x: Tensor) -> Tensor:
        """``scale * lora_b @ lora_a @ x``."""
        return self.config.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


class LoRA(LowRank):
    """See :class:`LoRAConfig`."""

    def update(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        return self.product(F.dropout(x, self.config.dropout, self.training))

    def merged(self, weight: Tensor) -> Tensor:
        """``[O, I]`` in the weight's dtype."""
        return self.config.scale * (self.lora_b.to(weight.dtype) @ self.lora_a.to(weight.dtype))


class EmbeddingLoRA(Adapter):
    """``lora_a [R, V]``, ``lora_b [O, R]``: adds ``scale * lora_b @ lora_a[:, id]``."""

    config: LoRAConfig
    asleep = ("lora_b",)

    def __init__(self, config: LoRAConfig, layer: nn.Module) -> None:
        super().__init__(config)
        assert isinstance(layer, nn.Embedding)
        empty = like(layer.weight)
        self.lora_a = nn.Parameter(empty.new_zeros(config.rank, layer.num_embeddings))
        self.lora_b = nn.Parameter(empty.new_empty(layer.embedding_dim, config.rank))
        nn.init.normal_(self.lora_b)

    def update(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """Ids ``[...]`` to ``[..., O]``."""
        return self.config.scale * F.linear(F.embedding(x, self.lora_a.t()), self.lora_b)

    def merged(self, weight: Tensor) -> Tensor:
        """``[V, O]`` in the weight's dtype."""
        return self.config.scale * (self.lora_b.to(weight.dtype) @ self.lora_a.to(weight.dtype)).t()


def like(weight: Tensor) -> Tensor:
    """An empty plain tensor of a weight's dtype and device, however the weight is stored."""
    return torch.empty(0, dtype=weight.dtype, device=weight.device)
