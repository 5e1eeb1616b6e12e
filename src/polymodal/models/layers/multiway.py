"""A transformer whose tokens are routed: attention for all, norms and MLPs by modality.

Legend: ``B`` rows, ``T`` tokens, ``N`` tokens of all rows, ``D`` width, ``F`` hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polymodal.core.config import Config
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.mlp import Activation, activate
from polymodal.models.layers.norm import build_norm
from polymodal.models.layers.transformer import TransformerConfig, initialise


class MultiwayConfig(Config):
    """Which tokens go to which expert.

    Source: BEiT-3, arXiv 2208.10442, section 2.1 (attention shared; a vision, a language and, in the top layers, a
    joint expert). The published code (``torchscale``) also routes the projections of the attention, norms its inner
    states (Magneto, arXiv 2210.06423) and has no joint experts:
    ``routed_attention``, ``sub_norm``, ``joint_layers: 0``.
    """

    experts: dict[str, str]
    """Stream -> name of the expert of its tokens."""
    joint_layers: int = Field(default=0, ge=0)
    """So many top layers have one more expert, which takes all tokens of samples with tokens of several experts."""
    routed_attention: bool = False
    """Whether each expert has its own query, key, value and output projections."""
    sub_norm: bool = False
    """Whether attention and MLP norm what goes into their last projection."""

    @model_validator(mode="after")
    def _several(self) -> Self:
        if len(self.names) < 2:
            raise ValueError(f"multiway.experts: found {self.experts}, expected at least two different experts")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the order of their first stream."""
        return tuple(dict.fromkeys(self.experts.values()))


class Routing:
    """Which tokens of a flattened batch go to which expert.

    Worked example: routes ``[0 1 0]`` of two experts have the order ``[0 2 1]``, counts ``[2 1]``, and the inverse
    ``[0 2 1]`` puts results back.

    Args:
        route_BT: int64, the expert of each token.
        num_experts: how many there are.
    """

    def __init__(self, route_BT: Tensor, num_experts: int) -> None:
        flat_N = route_BT.reshape(-1)
        self.order_N = torch.argsort(flat_N, stable=True)
        self.inverse_N = torch.empty_like(self.order_N)
        self.inverse_N[self.order_N] = torch.arange(len(flat_N), device=flat_N.device)
        self.counts: list[int] = torch.bincount(flat_N, minlength=num_experts).tolist()


class Routed(nn.Module):
    """One module per expert, of which each token goes through one; a single module takes all tokens.

    Args:
        build: makes one.
        experts: their names; one name: not routed.
    """

    def __init__(self, build: Callable[[], nn.Module], experts: Sequence[str]) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({name: build() for name in experts})

    def forward(self, x_BTD: Tensor, routing: Routing) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, ...]``."""
        experts = list(self.experts.values())
        out: Tensor
        if len(experts) == 1:
            out = experts[0](x_BTD)
            return out
        sorted_ND = x_BTD.flatten(0, 1).index_select(0, routing.order_N)
        parts = torch.split(sorted_ND, routing.counts)
        # An expert without tokens does not run: its gradient stays absent, and the optimizer leaves it alone.
        done = [expert(part) for expert, part in zip(experts, parts, strict=True) if len(part)]
        out = torch.cat(done).index_select(0, routing.inverse_N)
        return out.view(*x_BTD.shape[:2], -1)


class FeedForward(nn.Module):
    """``down(norm(act(up(x))))``, the norm only with ``sub_norm``."""

    def __init__(self, config: TransformerConfig, sub_norm: bool) -> None:
        super().__init__()
        hidden = config.mlp_dim or 4 * config.width
        self.activation: Activation = config.activation
        self.up_proj = nn.Linear(config.width, hidden, bias=config.bias)
        self.sub_norm = build_norm(config.norm, hidden, config.norm_eps, config.bias) if sub_norm else None
        self.down_proj = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        hidden_NF = activate(self.up_proj(x_ND), self.activation)
        out: Tensor = self.down_proj(hidden_NF if self.sub_norm is None else self.sub_norm(hidden_NF))
        return out


class MultiwayBlock(nn.Module):
    """Pre-norm attention among all tokens and an MLP, each part routed or shared.

    Args:
        config: of the stack.
        multiway: the experts.
        experts: of this layer.
    """

    def __init__(self, config: TransformerConfig, multiway: MultiwayConfig, experts: tuple[str, ...]) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        width, own = config.width, experts if multiway.routed_attention else ("shared",)
        bias = config.bias if config.qkv_bias is None else config.qkv_bias

        def norm() -> nn.Module:
            return build_norm(config.norm, width, config.norm_eps, config.bias)

        self.attention_norm = Routed(norm, experts)
        self.q_proj = Routed(lambda: nn.Linear(width, width, bias=bias), own)
        self.k_proj = Routed(lambda: nn.Linear(width, width, bias=bias), own)
        self.v_proj = Routed(lambda: nn.Linear(width, width, bias=bias), own)
        self.sub_norm = Routed(norm, own) if multiway.sub_norm else None
        self.out_proj = Routed(lambda: nn.Linear(width, width, bias=config.bias), own)
        self.mlp_norm = Routed(norm, experts)
        self.mlp = Routed(lambda: FeedForward(config, multiway.sub_norm), experts)

    def forward(self, x_BTD: Tensor, mask: Tensor | None, routing: Routing) -> Tensor:
        """One block; ``mask`` is ``may_attend`` or None."""
        inner = self.attention_norm(x_BTD, routing)
        q, k, v = (
            proj(inner, routing).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        joined = F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)
        if self.sub_norm is not None:
            joined = self.sub_norm(joined, routing)
        x_BTD = x_BTD + F.dropout(self.out_proj(joined, routing), self.dropout, self.training)
        branch = self.mlp(self.mlp_norm(x_BTD, routing), routing)
        return x_BTD + F.dropout(branch, self.dropout, self.training)


class Multiway(nn.Module):
    """A stack of :class:`MultiwayBlock`.

    Args:
        config: the architecture; plain pre-norm heads without rotary codes, gates, grouped heads or cross-attention.
        multiway: the experts.
    """

    def __init__(self, config: TransformerConfig, multiway: MultiwayConfig) -> None:
        super().__init__()
        self.config, self.multiway = config, multiway
        self.checkpointing = False
        names = multiway.names
        first_joint = config.depth - multiway.joint_layers
        self.blocks = nn.ModuleList(
            MultiwayBlock(config, multiway, (*names, "joint") if layer >= first_joint else names)
            for layer in range(config.depth)
        )
        self.final_norm = (
            Routed(lambda: build_norm(config.norm, config.width, config.norm_eps, config.bias), names)
            if config.final_norm
            else None
        )
        initialise(self, config.depth)
        for name, inner in self.named_modules():
            if isinstance(inner, nn.Linear) and ".out_proj." in name:
                # The stack's rule for the ends of residual branches goes by the last part of a name.
                nn.init.trunc_normal_(inner.weight, std=config.width**-0.5 / math.sqrt(2 * max(config.depth, 1)))

    def forward(self, x_BTD: Tensor, layout: Layout, route_BT: Tensor) -> Tensor:
        """States ``[B, T, D]``.

        Args:
            x_BTD: token states, positions already added.
            layout: who may attend to whom; padded rows.
            route_BT: int64, the expert of each token (its place in :attr:`MultiwayConfig.names`).
        """
        names = self.multiway.names
        own = Routing(route_BT, len(names))
        joint = Routing(self._joined(route_BT, layout), len(names) + 1) if self.multiway.joint_layers else own
        first_joint = len(self.blocks) - self.multiway.joint_layers
        for layer, block in enumerate(self.blocks):
            routing = joint if layer >= first_joint else own
            if self.checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, layout.mask, routing, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, layout.mask, routing)
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD, own)

    def _joined(self, route_BT: Tensor, layout: Layout) -> Tensor:
        """Rows with tokens of several experts go to the joint one as a whole; the others keep their own."""
        valid_BT = torch.ones_like(route_BT, dtype=torch.bool) if layout.is_valid_BT is None else layout.is_valid_BT
        held = [((route_BT == expert) & valid_BT).any(1) for expert in range(len(self.multiway.names))]
        is_mixed_B = torch.stack(held).sum(0) > 1
        return torch.where(is_mixed_B[:, None], len(self.multiway.names), route_BT)
