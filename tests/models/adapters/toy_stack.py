"""A small stack with tied weights, for tests of adapters."""

from __future__ import annotations

import torch
from torch import nn

from polymodal.models.adapters import AdapterConfig, adapter_parameters, apply_adapter

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.v_proj(self.norm(x) + self.q_proj(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x), torch.stack([block(x) for block in self.blocks])


def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every adapter values that are not its initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(*configs: AdapterConfig) -> Stack:
    """A stack with stirred adapters, named a, b, c in order."""
    model = Stack()
    for name, config in zip("abc", configs, strict=False):
        apply_adapter(model, config, name)
    stir(model)
    return model
