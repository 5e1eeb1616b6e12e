"""Bottleneck adapters behind or beside a sublayer. Legend: ``...`` leading axes, ``D`` width, ``F`` bottleneck."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.adapters.base import Adapter, AdapterConfig, is_linear, plain
from polymodal.models.adapters.lora import like
from polymodal.models.layers.attention import Attention
from polymodal.models.layers.mlp import MLP, Activation, activate


class BottleneckConfig(AdapterConfig):
    """Trains ``y + scale * up(act(down(y)))`` on a sublayer's output ``y``, before the residual sum.

    Args:
        match: which sublayers (attention, MLP) or linear layers. The default is both sublayers of every block
            (Houlsby); ``["*.mlp"]`` alone is the cheaper placement of Pfeiffer.
        width: of the bottleneck.
        activation: between the two projections.
        parallel: read the sublayer's input instead of its output.
        scale: factor of what is added.

    Source: Houlsby, arXiv 1902.00751, section 2.1; Pfeiffer, arXiv 2005.00247, section 3.2.2 (one adapter a block);
    parallel and scaled: He, arXiv 2110.04366, section 4.1. ``up`` starts at zero, not near it.
    """

    use: Literal["bottleneck"] = "bottleneck"
    noun = "sublayer or linear layer"

    match: tuple[str, ...] = ("*.attention", "*.mlp")
    width: int = Field(default=64, ge=1)
    activation: Activation = "relu"
    parallel: bool = False
    scale: float = Field(default=1.0, gt=0)

    def fits(self, module: nn.Module, field: str) -> bool:
        """Attention, MLPs and linear layers."""
        return plain(module) in (Attention, MLP) or is_linear(module)

    def build(self, module: nn.Module, path: str) -> Adapter:
        """See :class:`AdapterConfig`."""
        return Bottleneck(self, module)


class Bottleneck(Adapter):
    """``down [F, D]``, ``down_bias [F]``, ``up [D, F]``, ``up_bias [D]``.

    Raises:
        ConfigError: if it is parallel to a layer whose input it cannot read.
    """

    config: BottleneckConfig
    asleep = ("down", "down_bias")

    def __init__(self, config: BottleneckConfig, module: nn.Module) -> None:
        super().__init__(config)
        last = module
        for name in ("out_proj", "down_proj"):
            last = getattr(module, name, last)
        first = next((layer for layer in module.modules() if isinstance(layer, nn.Linear)), None)
        if not isinstance(last, nn.Linear) or first is None:
            raise ConfigError(f"adapter bottleneck: cannot tell the width of a {type(module).__name__}")
        inputs = first.in_features if config.parallel else last.out_features
        empty = like(last.weight)
        self.down = nn.Parameter(empty.new_empty(config.width, inputs))
        self.down_bias = nn.Parameter(empty.new_zeros(config.width))
        self.up = nn.Parameter(empty.new_zeros(last.out_features, config.width))
        self.up_bias = nn.Parameter(empty.new_zeros(last.out_features))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def update(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor | None:
        """Beside the sublayer."""
        return self._through(x) if self.config.parallel else None

    def change_output(self, y: Tensor) -> Tensor:
        """Behind the sublayer, after all updates."""
        return y if self.config.parallel else y + self._through(y)

    def _through(self, x: Tensor) -> Tensor:
        hidden = activate(F.linear(x, self.down, self.down_bias), self.config.activation)
        return self.config.scale * F.linear(hidden, self.up, self.up_bias)
