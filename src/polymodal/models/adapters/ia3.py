"""Learned gains. Legend: ``...`` any leading axes, ``I`` inputs, ``O`` outputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polymodal.core.patterns import matches
from polymodal.models.adapters.base import Adapter, AdapterConfig


class IA3Config(AdapterConfig):
    """Trains one gain per output of linear layers, or per input.

    Args:
        match: linear layers whose outputs are scaled; by default keys and values.
        inputs: linear layers whose inputs are scaled; by default the projection that ends an MLP.

    Source: (IA)^3, arXiv 2205.05638, section 3.3.
    """

    use: Literal["ia3"] = "ia3"
    is_mergeable = True

    match: tuple[str, ...] = ("*.k_proj", "*.v_proj")
    inputs: tuple[str, ...] = ("*.down_proj",)

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        """See :class:`AdapterConfig`; a layer in both is scaled on its inputs."""
        return (*super().targets, *(("inputs", pattern) for pattern in self.inputs))

    def build(self, module: nn.Module, path: str) -> Adapter:
        """See :class:`AdapterConfig`."""
        return IA3(self, module, any(matches(pattern, path) for pattern in self.inputs))


class IA3(Adapter):
    """``gain [O]``, or ``[I]``; starts at one.

    Args:
        config: how it was made.
        layer: the linear layer.
        on_inputs: whether the inputs are scaled.
    """

    def __init__(self, config: IA3Config, layer: nn.Module, on_inputs: bool) -> None:
        super().__init__(config)
        assert isinstance(layer, nn.Linear)
        self.on_inputs = on_inputs
        size = layer.in_features if on_inputs else layer.out_features
        dtype = layer.weight.dtype if layer.weight.dtype.is_floating_point else torch.float32
        self.gain = nn.Parameter(torch.ones(size, dtype=dtype, device=layer.weight.device))

    def change_input(self, x: Tensor) -> Tensor:
        """``[..., I]``."""
        return x * self.gain if self.on_inputs else x

    def change_output(self, y: Tensor) -> Tensor:
        """``[..., O]``."""
        return y if self.on_inputs else y * self.gain

    def gains(self) -> tuple[Tensor | None, Tensor | None]:
        """See :class:`Adapter`."""
        return (self.gain, None) if self.on_inputs else (None, self.gain)
