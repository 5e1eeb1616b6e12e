"""Low-rank adapters on linear layers.

Shape legend: ``...`` any leading axes, ``I`` inputs, ``O`` outputs, ``R`` rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.config import Config, Table
from polymodal.core.errors import ConfigError
from polymodal.core.patterns import match_names


class LoRAConfig(Config):
    """Trains ``weight + alpha / rank * lora_b @ lora_a`` with ``weight`` frozen.

    Args:
        rank: inner width of the update.
        alpha: numerator of its scale.
        dropout: probability of dropping an input of the update, not of the frozen path.
        match: which linear layers, as paths from the adapted part or patterns with ``*``; the default is all of them.

    Source: LoRA, arXiv 2106.09685, section 4.1. As in its reference code and unlike its text, ``lora_a`` starts
    uniform (Kaiming), not Gaussian; ``lora_b`` starts at zero.
    """

    use: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    match: tuple[str, ...] = Field(default=("*",), min_length=1)


ADAPTERS: Table[LoRAConfig] = Table("adapter", [LoRAConfig])


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update; ``weight`` and ``bias`` keep their names, values and storage."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_config: LoRAConfig

    @property
    def lora_scale(self) -> float:
        """The factor of the update."""
        return self.lora_config.alpha / self.lora_config.rank

    def forward(self, input: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        dropped = F.dropout(input, self.lora_config.dropout, self.training)
        update = F.linear(F.linear(dropped, self.lora_a), self.lora_b)
        return super().forward(input) + self.lora_scale * update


def apply_lora(module: nn.Module, config: LoRAConfig, where: str = "adapter") -> list[str]:
    """Give the linear layers of ``module`` that ``config.match`` selects an adapter, and freeze all else in it.

    Applying the same config again changes nothing, so that a later stage may go on with an adapter.

    Args:
        module: the part to adapt; changed in place.
        config: which layers and how.
        where: the place in the recipe, for messages.

    Returns:
        The paths of the adapted layers within ``module``, in module order.

    Raises:
        ConfigError: if a pattern selects no linear layer, or a layer has an adapter of another shape already.
    """
    linears = {name: layer for name, layer in module.named_modules() if type(layer) in (nn.Linear, LoRALinear)}
    chosen: set[str] = set()
    for pattern in config.match:
        chosen.update(match_names(pattern, linears, "linear layer", f"{where}.match"))
    different = [name for name in sorted(chosen) if _other_adapter(linears[name], config)]
    if different:
        old = linears[different[0]].lora_config
        raise ConfigError(
            f"{where}: {different[0] or 'the layer'} has a LoRA adapter of rank {old.rank}, alpha {old.alpha}, dropout "
            f"{old.dropout} from an earlier stage, expected the same settings, not rank {config.rank}, alpha "
            f"{config.alpha}, dropout {config.dropout}; merge it first or keep its settings"
        )
    for name, layer in linears.items():
        if name in chosen and type(layer) is nn.Linear:
            _adapt(layer, config)
    trained = {id(p) for name in chosen for p in (linears[name].lora_a, linears[name].lora_b)}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return [name for name in linears if name in chosen]


def _other_adapter(layer: nn.Module, config: LoRAConfig) -> bool:
    if not isinstance(layer, LoRALinear):
        return False
    return layer.lora_config.model_copy(update={"match": config.match}) != config


def _adapt(layer: nn.Linear, config: LoRAConfig) -> None:
    """Turn the object itself into a LoRALinear: every place that holds it, under whatever name, sees the adapter."""
    layer.__class__ = LoRALinear
    assert isinstance(layer, LoRALinear)
    layer.lora_config = config
    layer.lora_a = nn.Parameter(layer.weight.new_empty(config.rank, layer.in_features))
    layer.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, config.rank))
    nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


@torch.no_grad()
def merge_lora(module: nn.Module) -> list[str]:
    """Add every adapter of ``module`` to its weight and turn the layer back into a plain linear one.

    The sum is formed in float32. A weight that is shared with another module is copied first, so that the other one
    keeps its values.

    Returns:
        The paths of the merged layers.
    """
    merged = []
    for name, layer in module.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        update_OI = layer.lora_scale * (layer.lora_b.float() @ layer.lora_a.float())
        weight_OI = (layer.weight.float() + update_OI).to(layer.weight.dtype)
        layer.weight = nn.Parameter(weight_OI, requires_grad=layer.weight.requires_grad)
        del layer.lora_a, layer.lora_b, layer.lora_config
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        merged.append(name)
    return merged
