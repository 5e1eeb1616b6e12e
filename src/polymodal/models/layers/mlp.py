"""The position-wise part of a block. Legend: ``D`` width, ``F`` hidden width."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Apply an activation by name; ``quick_gelu`` is ``x * sigmoid(1.702 x)`` as CLIP's weights expect."""
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if kind == "silu":
        return F.silu(x)
    return F.relu(x)


class MLP(nn.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` when gated (Shazeer 2020, GLU variants).

    Args:
        width: ``D``.
        hidden: ``F``.
        activation: name of the non-linearity.
        gated: whether a second projection gates the first.
        bias: whether the projections have a bias.
        sub_norm: normalises the hidden state before the last projection (Magneto, arXiv 2210.06423); None: nothing.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation,
        gated: bool,
        bias: bool,
        sub_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = nn.Linear(width, hidden, bias=bias) if gated else None
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.sub_norm = sub_norm
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        up_BTF = self.up_proj(x_BTD)
        if self.gate_proj is None:
            hidden_BTF = activate(up_BTF, self.activation)
        else:
            hidden_BTF = activate(self.gate_proj(x_BTD), self.activation) * up_BTF
        if self.sub_norm is not None:
            hidden_BTF = self.sub_norm(hidden_BTF)
        out: Tensor = self.down_proj(hidden_BTF)
        return out
