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
from polymodal.models.layers.dropping import Watch
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory
from polymodal.models.layers.norm import NormKind, build_norm
from polymodal.models.layers.positions import rotate


@dataclass(frozen=True, eq=False)
class Step:
    """What every layer of one forward pass shares; the transformer makes it once.

    Args:
        layout: who may attend to whom.
        rope: cosines and sines of the rotary code, or None.
        mask: ``may_attend`` over the keys, or what is added to the scores (relative positions, -inf where a token may
            not attend), or None. Of packed segments: ``[1, H, L, L]`` of the longest, or None.
        is_causal: whether the causal flag stands in for a mask.
        cache: keys and values of earlier tokens, or None.
        is_first: whether the cache was empty before this step.
        watch: takes the attention that tokens receive, or None.
        wide: the same without a window, for blocks that have none; None if all are alike.
    """

    layout: Layout
    rope: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_causal: bool
    cache: KVCache | None = None
    is_first: bool = False
    watch: Watch | None = None
    wide: Step | None = None


@dataclass(frozen=True, slots=True)
class AttentionExtras:
    """What few architectures do otherwise.

    Args:
        qk_norm: norm over each head of queries and keys (arXiv 2302.05442, section 2.1; per head as in Qwen3), or None.
        norm_eps: epsilon of that norm.
        key_bias: whether keys have a bias, where that differs (None: as queries and values).
        scale: what scores are multiplied by; None: ``head_dim ** -0.5``.
        extra_key: whether every token also attends to one learned key and value (``bias_k`` and ``bias_v`` of PyTorch's
            own attention); for bidirectional rows.
    """

    qk_norm: NormKind | None = None
    norm_eps: float = 1e-5
    key_bias: bool | None = None
    scale: float | None = None
    extra_key: bool = False


_NO_EXTRAS = AttentionExtras()


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
        dropout: probability of dropping an attention weight while training.
        extras: what most do not need.
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
        dropout: float = 0.0,
        extras: AttentionExtras = _NO_EXTRAS,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.dropout, self.scale = dropout, extras.scale
        key_bias = qkv_bias if extras.key_bias is None else extras.key_bias
        source = width if memory_width is None else memory_width
        self.q_proj = nn.Linear(width, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(source, kv_heads * head_dim, bias=key_bias)
        self.v_proj = nn.Linear(source, kv_heads * head_dim, bias=qkv_bias)
        self.out_proj = nn.Linear(heads * head_dim, width, bias=bias)
        self.sub_norm: nn.Module | None = None
        """What the joined heads go through before the output projection; set by whoever builds the block."""
        qk_norm, norm_eps = extras.qk_norm, extras.norm_eps
        self.q_norm = build_norm(qk_norm, head_dim, norm_eps) if qk_norm else None
        self.k_norm = build_norm(qk_norm, head_dim, norm_eps) if qk_norm else None
        shape, std = (kv_heads, head_dim), (kv_heads * head_dim) ** -0.5
        self.extra_k = nn.Parameter(torch.randn(shape) * std) if extras.extra_key else None
        self.extra_v = nn.Parameter(torch.randn(shape) * std) if extras.extra_key else None

    def forward(self, x_BTD: Tensor, step: Step, layer: int, read_K: Tensor | None = None) -> Tensor:
        """Self-attention; ``layer`` is the place in the cache.

        With ``read_K``, places of the flattened tokens, only their output is projected: ``[1, K, D]``.

        Raises:
            ConfigError: if there is an extra key and the layout is not one of bidirectional rows.
        """
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD, x_BTD)
        if step.rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, step.rope), rotate(k_BTGK, step.rope)
        if step.layout.segment_lengths is not None:
            if self.extra_k is not None:
                raise ConfigError("extra_key: found a packed layout, expected bidirectional rows")
            return self._packed(q_BTHK, k_BTGK, v_BTGK, step, read_K)
        q, k, v = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        if step.watch is not None:
            step.watch.see(q, k, self.scale)
        if step.cache is not None:
            seen_k, seen_v = step.cache.append(layer, k, v)
            if not step.is_first:
                k, v = seen_k.to(q.dtype), seen_v.to(q.dtype)
        if self.extra_k is not None and self.extra_v is not None:
            if step.layout.causal or step.cache is not None:
                raise ConfigError("extra_key: found a causal layout or a cache, expected bidirectional rows")
            k, v = _one_more(k, self.extra_k), _one_more(v, self.extra_v)
            mask = None if step.mask is None else F.pad(step.mask, (0, 1), value=step.mask.dtype == torch.bool)
            return self._join(self._attend(q, k, v, mask, False), read_K)
        return self._join(self._attend(q, k, v, step.mask, step.is_causal), read_K)

    def cross(
        self, x_BTD: Tensor, memory: Memory, layout: Layout, layer: int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """Attention to a memory; a token that sees none of it receives exactly zero.

        Args:
            x_BTD: the tokens.
            memory: what they look at; of a packed layout, one row for each segment.
            layout: how the tokens stand.
            layer: place in the cache.
            cache: keeps the memory's keys and values, so that later steps do not project it again.
        """
        rows = x_BTD.shape[0] if layout.segment_lengths is None else len(layout.segment_lengths)
        if memory.x_BMC.shape[0] != rows:
            raise ConfigError(f"cross-attention: found a memory of {memory.x_BMC.shape[0]} rows, expected {rows}")
        if memory.is_empty:
            return x_BTD.new_zeros(*x_BTD.shape[:2], self.out_proj.out_features)
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        q_BTHK = _normed(q_BTHK, self.q_norm)
        k, v = self._memory_keys(memory, layer, cache)
        if layout.segment_lengths is not None:
            return self._seen_packed(q_BTHK, k.to(q_BTHK.dtype), v.to(q_BTHK.dtype), memory, layout)
        mask, sees_any = memory.mask
        return self._seen(q_BTHK, k, v, mask, sees_any)

    def _seen_packed(self, q_BTHK: Tensor, k: Tensor, v: Tensor, memory: Memory, layout: Layout) -> Tensor:
        """Attention of packed segments, each to its own row of the memory, in the calls of :attr:`Layout.buckets`."""
        shapes, index, inverse = layout.buckets
        mask, sees_any = memory.mask
        is_by_token = memory.may_attend_BTM is not None
        q_NHK = q_BTHK.squeeze(0) if index is None else q_BTHK[0].index_select(0, index)
        if is_by_token and mask is not None:
            mask = mask[0] if index is None else mask[0].index_select(0, index)
        counts, sizes = [count for count, _ in shapes], [count * length for count, length in shapes]
        # Split once, so that the backward pass is one join; slices would each make a full-size gradient.
        masks = [None] * len(shapes) if mask is None else torch.split(mask, sizes if is_by_token else counts)
        calls = zip(
            shapes, torch.split(q_NHK, sizes), torch.split(k, counts), torch.split(v, counts), masks, strict=True
        )
        parts = []
        for shape, q, own_k, own_v, own_mask in calls:
            if own_mask is not None:
                own_mask = (torch.unflatten(own_mask, 0, shape) if is_by_token else own_mask)[:, None]
            seen = self._attend(torch.unflatten(q, 0, shape).transpose(1, 2), own_k, own_v, own_mask, False)
            parts.append(seen.transpose(1, 2).flatten(0, 1).flatten(1))
        joined_NC = torch.cat(parts) if len(parts) > 1 else parts[0]
        out_BTD = self._out((joined_NC if inverse is None else joined_NC.index_select(0, inverse))[None])
        if sees_any is None:
            return out_BTD
        if not is_by_token:
            lengths_S = torch.tensor(layout.segment_lengths, device=sees_any.device)
            sees_any = sees_any[:, 0].repeat_interleave(lengths_S)[None]
        return out_BTD * sees_any[..., None]

    def _seen(self, q_BTHK: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sees_any: Tensor | None) -> Tensor:
        """Attention of padded rows to their memory; mask ``[B, T or 1, M]``, sees_any ``[B, T or 1]``."""
        mask = None if mask is None else mask[:, None]
        out_BTD = self._join(self._attend(q_BTHK.transpose(1, 2), k.to(q_BTHK.dtype), v.to(q_BTHK.dtype), mask, False))
        return out_BTD if sees_any is None else out_BTD * sees_any[..., None]

    def _memory_keys(self, memory: Memory, layer: int, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, M, K]`` of a memory."""
        if cache is not None and layer in cache.memory_keys:
            return cache.memory_keys[layer]
        x_BMC = memory.x_BMC
        k = _normed(self.k_proj(x_BMC).unflatten(-1, (self.kv_heads, self.head_dim)), self.k_norm).transpose(1, 2)
        v = self.v_proj(x_BMC).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if cache is not None:
            cache.memory_keys[layer] = (k, v)
        return k, v

    def _project(self, x_BTD: Tensor, source_BMC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        k_BMGK = self.k_proj(source_BMC).unflatten(-1, (self.kv_heads, self.head_dim))
        v_BMGK = self.v_proj(source_BMC).unflatten(-1, (self.kv_heads, self.head_dim))
        # Under autocast projections answer in bfloat16; norm in the weights' dtype, then attend in one dtype.
        q_BTHK, k_BMGK = _normed(q_BTHK, self.q_norm), _normed(k_BMGK, self.k_norm)
        return q_BTHK, k_BMGK, v_BMGK

    def _packed(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, step: Step, read_K: Tensor | None = None
    ) -> Tensor:
        shapes, index, inverse = step.layout.buckets
        # The backward pass of a squeeze is a view, that of indexing the one row a copy into zeros.
        rows = [part.squeeze(0) for part in (q_BTHK, k_BTGK, v_BTGK)]
        if index is not None:
            rows = [row.index_select(0, index) for row in rows]
        # One split, whose backward is one cat: slicing would make a full-size gradient for every segment.
        sizes = [count * length for count, length in shapes]
        parts = []
        for (count, length), q, k, v in zip(shapes, *(torch.split(row, sizes) for row in rows), strict=True):
            q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in (q, k, v))
            # Positions count from 0 in every segment: the bias of a shorter one is a corner of the longest's.
            bias = None if step.mask is None else step.mask[..., :length, :length]
            parts.append(self._attend(q, k, v, bias, step.is_causal).transpose(1, 2).reshape(count * length, -1))
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        if read_K is not None:
            inverse = read_K if inverse is None else inverse[read_K]
        if inverse is not None:
            joined = joined.index_select(0, inverse)
        return self._out(joined[None])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
            # On CPU the backward pass of attention in bfloat16 takes many times as long as in float32.
            with torch.autocast("cpu", enabled=False):
                return self._attend(q.float(), k.float(), v.float(), mask, is_causal).to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        if self.kv_heads == self.heads:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale)
        if q.shape[2] == 1:
            # One query per head: the heads of a group become the queries of their key-value head, nothing is copied.
            grouped = q.reshape(q.shape[0], self.kv_heads, -1, self.head_dim)
            return F.scaled_dot_product_attention(grouped, k, v, mask, dropout, scale=self.scale).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale, enable_gqa=True)

    def _join(self, x_BHTK: Tensor, read_K: Tensor | None = None) -> Tensor:
        x_BTC = x_BHTK.transpose(1, 2).flatten(2)
        return self._out(x_BTC if read_K is None else chosen(x_BTC, read_K))

    def _out(self, x_BTC: Tensor) -> Tensor:
        out: Tensor = self.out_proj(x_BTC if self.sub_norm is None else self.sub_norm(x_BTC))
        return out


def chosen(x_BTD: Tensor, read_K: Tensor) -> Tensor:
    """The tokens ``[1, K, D]`` at these places of the flattened rows."""
    return torch.flatten(x_BTD, 0, 1).index_select(0, read_K)[None]


def _one_more(x_BGTK: Tensor, extra_GK: Tensor) -> Tensor:
    """Keys or values with a learned one behind them."""
    extra = extra_GK.to(x_BGTK.dtype)[None, :, None].expand(x_BGTK.shape[0], -1, -1, -1)
    return torch.cat((x_BGTK, extra), dim=2)


def _normed(x_BTHK: Tensor, norm: nn.Module | None) -> Tensor:
    """Queries or keys through their norm, which computes in its own dtype."""
    if norm is None:
        return x_BTHK
    weight = norm.weight
    assert isinstance(weight, Tensor)
    out: Tensor = norm(x_BTHK.to(weight.dtype)).to(x_BTHK.dtype)
    return out
