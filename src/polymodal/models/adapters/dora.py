"""Weight-decomposed low-rank adapters. Legend: ``...`` any leading axes, ``I`` inputs, ``O`` outputs, ``R`` rank."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polymodal.models.adapters.base import Adapter, plain_weight
from polymodal.models.adapters.lora import LowRank, LowRankConfig


class DoRAConfig(LowRankConfig):
    """Trains the length of every row of the weight apart from its direction, the direction by a low-rank update.

    ``weight`` becomes ``magnitude * (weight + update) / |weight + update|``, norms over each output's row.

    Source: DoRA, arXiv 2402.09353, section 4.1; the norm gets no gradient (section 4.3).
    """

    use: Literal["dora"] = "dora"

    def build(self, module: nn.Module, path: str) -> Adapter:
        """See :class:`AdapterConfig`."""
        return DoRA(self, module)


class DoRA(LowRank):
    """``lora_a [R, I]``, ``lora_b [O, R]``, ``magnitude [O]``."""

    config: DoRAConfig

    def __init__(self, config: DoRAConfig, layer: nn.Module) -> None:
        super().__init__(config, layer)
        assert isinstance(layer, nn.Linear)
        norm_O = torch.linalg.vector_norm(plain_weight(layer.weight.detach()), dim=1)
        self.magnitude = nn.Parameter(norm_O.to(self.lora_a.dtype))

    def update(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        assert isinstance(layer, nn.Linear)
        gain_O = self._gain(plain_weight(layer.weight.detach())).to(x.dtype)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout, True)
            y = F.linear(x, layer.weight)
        elif layer.bias is not None:
            y = y - layer.bias
        return (gain_O - 1) * y + gain_O * self.product(x)

    def merged(self, weight: Tensor) -> Tensor:
        """``[O, I]`` in the weight's dtype."""
        direction_OI = weight + self._change(weight.dtype)
        return self._gain(weight).to(weight.dtype)[:, None] * direction_OI - weight

    def _change(self, dtype: torch.dtype) -> Tensor:
        return self.config.scale * (self.lora_b.to(dtype) @ self.lora_a.to(dtype))

    def _gain(self, weight_OI: Tensor) -> Tensor:
        norm_O = torch.linalg.vector_norm(weight_OI + self._change(weight_OI.dtype).detach(), dim=1)
        gain_O: Tensor = self.magnitude / norm_O
        return gain_O
