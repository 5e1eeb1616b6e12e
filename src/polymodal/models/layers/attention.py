"""Attention: grouped heads, rotary codes, query-key norm, packed or padded, cached, and to a memory.

Legend: ``B`` rows, ``T`` tokens, ``M`` keys, ``H`` heads, ``G`` key-value heads, ``K`` head width, ``D`` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.norm import NormKind, build_norm
from polymodal.models.layers.positions import rotate


@dataclass(frozen=True, eq=False)
class Memory:
    """What cross-attention looks at.

    Args:
        x_BMC: features; for a packed layout, ``B`` is the number of segments and row s belongs to segment s.
        is_valid_BM: bool, False on padding; None if there is none. A row without a valid feature gives zeros.
    """

    x_BMC: Tensor
    is_valid_BM: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """What every layer of one forward pass shares; the transformer makes it once.

    Args:
        layout: who may attend to whom.
        rope: cosines and sines of the rotary code, or None.
        mask: ``may_attend`` over the keys, or None.
        is_causal: whether the causal flag stands in for a mask.
        cache: keys and values of earlier tokens, or None.
        is_first: whether the cache was empty before this step.
    """

    layout: Layout
    rope: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_causal: bool
    cache: KVCache | None = None
    is_first: bool = False


class Attention(nn.Module):
    """Multi-head attention over ``[B, T, D]``, to itself or to a memory.

    Args:
        width: ``D``.
        heads: ``H``.
        kv_heads: ``G``; each serves ``H / G`` query heads (grouped-query attention, arXiv 2305.13245, section 2.2).
        head_dim: ``K``.
        memory_width: width of keys' and values' input; None attends to itself.
        qkv_bias: whether queries, keys and values have a bias.
        bias: whether the output projection has one.
        qk_norm: norm over each head of queries and keys (arXiv 2302.05442, section 2.1; per head as in Qwen3), or None.
        norm_eps: epsilon of that norm.
        dropout: probability of dropping an attention weight while training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        memory_width: int | None = None,
        qkv_bias: bool = True,
        bias: bool = True,
        qk_norm: NormKind | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.dropout = dropout
        source = width if memory_width is None else memory_width
        self.q_proj = nn.Linear(width, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(source, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(source, kv_heads * head_dim, bias=qkv_bias)
        self.out_proj = nn.Linear(heads * head_dim, width, bias=bias)
        self.q_norm = build_norm(qk_norm, head_dim, norm_eps) if qk_norm else None
        self.k_norm = build_norm(qk_norm, head_dim, norm_eps) if qk_norm else None

    def forward(self, x_BTD: Tensor, step: Step, layer: int) -> Tensor:
        """Self-attention; ``layer`` is the place in the cache."""
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD, x_BTD)
        if step.rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, step.rope), rotate(k_BTGK, step.rope)
        if step.layout.segment_lengths is not None:
            return self._packed(q_BTHK, k_BTGK, v_BTGK, step)
        q, k, v = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        if step.cache is not None:
            seen_k, seen_v = step.cache.append(layer, k, v)
            if not step.is_first:
                k, v = seen_k.to(q.dtype), seen_v.to(q.dtype)
        return self._join(self._attend(q, k, v, step.mask, step.is_causal))

    def cross(self, x_BTD: Tensor, memory: Memory, layout: Layout) -> Tensor:
        """Attention to a memory; a row (or segment) whose memory is all padding receives exactly zero."""
        rows = x_BTD.shape[0] if layout.segment_lengths is None else len(layout.segment_lengths)
        if memory.x_BMC.shape[0] != rows:
            raise ConfigError(f"cross-attention: found a memory of {memory.x_BMC.shape[0]} rows, expected {rows}")
        q_BTHK, k_BMGK, v_BMGK = self._project(x_BTD, memory.x_BMC)
        k, v = k_BMGK.transpose(1, 2), v_BMGK.transpose(1, 2)
        mask, has_any_B = _memory_mask(memory)
        if layout.segment_lengths is None:
            out_BTD = self._join(self._attend(q_BTHK.transpose(1, 2), k, v, mask, False))
            return out_BTD if has_any_B is None else out_BTD * has_any_B[:, None, None]
        parts, segment = [], 0
        queries = torch.split(q_BTHK[0], [count * length for count, length in layout.groups])
        for (count, length), part in zip(layout.groups, queries, strict=True):
            q = part.view(count, length, *part.shape[1:]).transpose(1, 2)
            rows_of = slice(segment, segment + count)
            group_mask = None if mask is None else mask[rows_of]
            out = self._join(self._attend(q, k[rows_of], v[rows_of], group_mask, False))
            if has_any_B is not None:
                out = out * has_any_B[rows_of, None, None]
            parts.append(out.flatten(0, 1))
            segment += count
        return torch.cat(parts)[None]

    def _project(self, x_BTD: Tensor, source_BMC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        k_BMGK = self.k_proj(source_BMC).unflatten(-1, (self.kv_heads, self.head_dim))
        v_BMGK = self.v_proj(source_BMC).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast projections answer in bfloat16; norm in the weights' dtype, then attend in one dtype.
            dtype, precise = v_BMGK.dtype, self.q_norm.weight.dtype
            q_BTHK = self.q_norm(q_BTHK.to(precise)).to(dtype)
            k_BMGK = self.k_norm(k_BMGK.to(precise)).to(dtype)
        return q_BTHK, k_BMGK, v_BMGK

    def _packed(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, step: Step) -> Tensor:
        shapes, index, inverse = step.layout.buckets
        rows = [part[0] if index is None else part[0].index_select(0, index) for part in (q_BTHK, k_BTGK, v_BTGK)]
        # One split, whose backward is one cat: slicing would make a full-size gradient for every segment.
        sizes = [count * length for count, length in shapes]
        parts = []
        for (count, length), q, k, v in zip(shapes, *(torch.split(row, sizes) for row in rows), strict=True):
            q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in (q, k, v))
            parts.append(self._attend(q, k, v, None, step.is_causal).transpose(1, 2).reshape(count * length, -1))
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        if inverse is not None:
            joined = joined.index_select(0, inverse)
        out: Tensor = self.out_proj(joined[None])
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.kv_heads == self.heads:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        if q.shape[2] == 1:
            # One query per head: the heads of a group become the queries of their key-value head, nothing is copied.
            grouped = q.reshape(q.shape[0], self.kv_heads, -1, self.head_dim)
            return F.scaled_dot_product_attention(grouped, k, v, mask, dropout).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=True)

    def _join(self, x_BHTK: Tensor) -> Tensor:
        out: Tensor = self.out_proj(x_BHTK.transpose(1, 2).flatten(2))
        return out


def _memory_mask(memory: Memory) -> tuple[Tensor | None, Tensor | None]:
    if memory.is_valid_BM is None or bool(memory.is_valid_BM.all()):
        return None, None
    has_any_B = memory.is_valid_BM.any(dim=1)
    mask = (memory.is_valid_BM | ~has_any_B[:, None])[:, None, None]
    return mask, (None if bool(has_any_B.all()) else has_any_B)
