"""The transformer stack. Legend: ``B`` rows, ``T`` tokens, ``D`` width."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.models.layers.attention import Attention, AttentionExtras, Step, chosen
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.cut import Cut
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory
from polymodal.models.layers.mlp import MLP, Activation
from polymodal.models.layers.norm import NormKind, build_norm
from polymodal.models.layers.positions import RelativePositions, rope_tables
from polymodal.models.layers.rope_scaling import RopeScaling


class TransformerConfig(Config):
    """Everything that tells one published transformer from another, embeddings and heads apart."""

    width: int = Field(default=128, ge=1)
    depth: int = Field(default=4, ge=0)
    heads: int = Field(default=4, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    """Key-value heads; None: as many as heads."""
    head_dim: int | None = Field(default=None, ge=1)
    """Width of one head; None: width / heads."""
    mlp_dim: int | None = Field(default=None, ge=1)
    """Hidden width of the MLP; None: 4 x width."""
    norm: NormKind = "layer"
    """The kind of its norms."""
    norm_eps: float = Field(default=1e-5, gt=0)
    activation: Activation = "gelu"
    gated: bool = False
    """Whether the MLP is gated (three projections)."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    bias: bool = True
    """Whether projections and layer norms have a bias."""
    qkv_bias: bool | None = None
    """Whether queries, keys and values have a bias; None: as ``bias``."""
    key_bias: bool | None = None
    """Whether keys have one (a bias of keys shifts all scores of a query alike); None: as queries and values."""
    rope_theta: float | None = Field(default=None, gt=0)
    """Base of the rotary code; None: no rotary code."""
    rope_scaling: RopeScaling | None = None
    """How the rotary code is stretched to longer texts; None: not."""
    window: int | None = Field(default=None, ge=1)
    """Tokens that a token of a causal layout sees, itself included (arXiv 2310.06825, section 2); None: all before."""
    window_from: int = Field(default=0, ge=0)
    """With ``window``: blocks before this one see all tokens before (Qwen2's ``max_window_layers``)."""
    relative_buckets: int | None = Field(default=None, ge=4)
    """Buckets of learned relative positions, added to the attention scores of every block alike (T5); None: none."""
    relative_distance: int = Field(default=128, ge=2)
    """Distance from which on all relative positions share a bucket."""
    attention_scale: float | None = Field(default=None, gt=0)
    """What attention scores are multiplied by (T5: 1); None: ``head width ** -0.5``."""
    extra_key: bool = False
    """Whether every token also attends to one learned key and value (ImageBind); for bidirectional rows."""
    sub_norm: Literal["none", "mlp", "both"] = "none"
    """Norms before the last projection of the MLP, or of MLP and self-attention (Magneto, arXiv 2210.06423; EVA-02)."""
    pre_norm: bool = True
    """Whether norms stand before each sublayer (GPT-2 and later) or after the residual sum (BERT)."""
    branch_norm: bool = False
    """Whether norms stand behind each sublayer instead, before the residual sum (Swin V2, arXiv 2111.09883, section
    3.2; EVA-02 enormous)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of attention weights and of each sublayer's output."""
    layer_scale: float | None = Field(default=None, gt=0)
    """Initial per-channel gain of each sublayer (arXiv 2103.17239, section 2); None: no gain."""
    cross_width: int | None = Field(default=None, ge=1)
    """Width of the memory that blocks cross-attend to, between self-attention and MLP; None: no cross-attention."""
    cross_every: int = Field(default=1, ge=1)
    """Blocks 0, n, 2n, ... cross-attend."""
    cross_gate: Literal["none", "tanh", "tanh_channel"] = "none"
    """``none``: cross-attention stands within the block. ``tanh``: a block of its own, cross-attention and MLP, stands
    before it, and a learned gate that starts closed lets its results in (Flamingo, arXiv 2204.14198, section 3.2).
    ``tanh_channel``: with a gate per channel."""
    cross_qk_norm: bool = False
    """Whether queries and keys of the cross-attention are normalised per head."""
    final_norm: bool = True
    """Whether the output is normalised."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; change one or set head_dim")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.relative_buckets is not None and self.num_kv_heads != self.heads:
            raise ValueError(
                f"relative positions need as many kv_heads as heads, found {self.kv_heads} and {self.heads}"
            )
        if self.relative_buckets is not None and self.window is not None:
            raise ValueError(f"found both relative positions and window {self.window}, expected one of them")
        if self.window_from and self.window is None:
            raise ValueError(f"found window_from {self.window_from} without a window, expected window beside it")
        self._check_scaling()
        if self.branch_norm and not self.pre_norm:
            raise ValueError("found branch_norm with pre_norm: false, expected one place for the norms; leave one out")
        if self.rope_theta is not None and self.size_of_head % 2:
            raise ValueError(f"rotary codes need an even head width, found {self.size_of_head}")
        return self

    def _check_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        if self.rope_theta is None:
            raise ValueError("found rope_scaling without a rotary code, expected rope_theta beside it")
        if scaling.kind == "longrope" and 2 * len(scaling.short_factors) != self.size_of_head:
            raise ValueError(
                f"rope_scaling: found {len(scaling.short_factors)} factors, expected {self.size_of_head // 2}: one for "
                "every pair of a head"
            )

    @property
    def num_kv_heads(self) -> int:
        """``kv_heads`` with its default filled in."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def size_of_head(self) -> int:
        """``head_dim`` with its default filled in."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    def resolved(self) -> Self:
        """The same architecture with every default that follows from other fields filled in."""
        qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        return self.model_copy(
            update={
                "kv_heads": self.num_kv_heads,
                "head_dim": self.size_of_head,
                "mlp_dim": self.mlp_dim or 4 * self.width,
                "qkv_bias": qkv_bias,
                "key_bias": qkv_bias if self.key_bias is None else self.key_bias,
            }
        )


class GatedCross(nn.Module):
    """Cross-attention and an MLP, each let in by the hyperbolic tangent of a learned gate.

    The gates start at zero: a decoder that learns to see answers at first as it did before.

    Source: Flamingo, arXiv 2204.14198, section 3.2 and figure 4. Tokens that see nothing pass the MLP as well.

    Args:
        config: of the whole stack.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        gate_width = config.width if config.cross_gate == "tanh_channel" else 1
        self.attention_norm = _norm(config)
        self.attention = _attention(config, config.cross_width)
        self.attention_gate = nn.Parameter(torch.zeros(gate_width))
        self.mlp_norm = _norm(config)
        self.mlp = _mlp(config)
        self.mlp_gate = nn.Parameter(torch.zeros(gate_width))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def gates(self) -> tuple[nn.Parameter, nn.Parameter]:
        """What lets in, before the tangent: of the attention and of the MLP."""
        return self.attention_gate, self.mlp_gate

    def forward(self, x_BTD: Tensor, step: Step, layer: int, memory: Memory | None) -> Tensor:
        """Let a memory in; without one only the MLP acts."""
        if memory is not None:
            branch = self.attention.cross(self.attention_norm(x_BTD), memory, step.layout, layer, step.cache)
            x_BTD = x_BTD + self.attention_gate.tanh() * self.dropout(branch)
        out: Tensor = x_BTD + self.mlp_gate.tanh() * self.dropout(self.mlp(self.mlp_norm(x_BTD)))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention where the config asks for it, MLP; each with a residual.

    Args:
        config: of the whole stack.
        has_cross: whether this block cross-attends.
    """

    def __init__(self, config: TransformerConfig, has_cross: bool) -> None:
        super().__init__()
        self.pre_norm, self.branch_norm = config.pre_norm, config.branch_norm
        self.gated_cross = GatedCross(config) if has_cross and config.cross_gate != "none" else None
        has_cross = has_cross and config.cross_gate == "none"
        self.attention_norm = _norm(config)
        self.attention = _attention(config, None)
        self.cross_norm = _norm(config) if has_cross else None
        self.cross_attention = _attention(config, config.cross_width) if has_cross else None
        self.mlp_norm = _norm(config)
        self.mlp = _mlp(config)
        self.dropout = nn.Dropout(config.dropout)
        scale = config.layer_scale
        self.attention_scale = nn.Parameter(torch.full((config.width,), scale)) if scale else None
        self.cross_scale = nn.Parameter(torch.full((config.width,), scale)) if scale and has_cross else None
        self.mlp_scale = nn.Parameter(torch.full((config.width,), scale)) if scale else None

    def forward(
        self, x_BTD: Tensor, step: Step, layer: int, memory: Memory | None, read_K: Tensor | None = None
    ) -> Tensor:
        """One block; ``layer`` is its place in the cache.

        With ``read_K``, places of the flattened tokens, what follows attention is computed for them alone: [1, K, D].
        """
        if self.gated_cross is not None:
            x_BTD = self.gated_cross(x_BTD, step, layer, memory)
        branch = self.attention(self.enter(x_BTD, self.attention_norm), step, layer, read_K)
        if read_K is not None:
            x_BTD = chosen(x_BTD, read_K)
        x_BTD = self.add(x_BTD, branch, self.attention_scale, self.attention_norm)
        if self.cross_attention is not None and self.cross_norm is not None and memory is not None:
            inner = self.enter(x_BTD, self.cross_norm)
            branch = self.cross_attention.cross(inner, memory, step.layout, layer, step.cache)
            x_BTD = self.add(x_BTD, branch, self.cross_scale, self.cross_norm)
        return self.add(x_BTD, self.mlp(self.enter(x_BTD, self.mlp_norm)), self.mlp_scale, self.mlp_norm)

    def enter(self, x_BTD: Tensor, norm: nn.Module) -> Tensor:
        """What a sublayer takes: normalised where norms stand before it."""
        return norm(x_BTD) if self.pre_norm and not self.branch_norm else x_BTD

    def add(self, x_BTD: Tensor, branch_BTD: Tensor, scale_D: Tensor | None, norm: nn.Module) -> Tensor:
        """The residual sum of the states and what a sublayer gave, its norm, gain and dropout where they belong."""
        branch_BTD = self.dropout(norm(branch_BTD) if self.branch_norm else branch_BTD)
        x_BTD = x_BTD + (branch_BTD if scale_D is None else branch_BTD * scale_D)
        return x_BTD if self.pre_norm else norm(x_BTD)


class Transformer(nn.Module):
    """A stack of blocks over ``[B, T, D]``; embeddings, learned positions and heads are the caller's.

    Set ``checkpointing`` to True to recompute each block in the backward pass instead of keeping its activations.

    Args:
        config: the architecture.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        crosses = [config.cross_width is not None and i % config.cross_every == 0 for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, has_cross) for has_cross in crosses)
        self.final_norm = _norm(config) if config.final_norm else None
        self.relative: RelativePositions | None = None
        if config.relative_buckets is not None:
            self.relative = RelativePositions(config.relative_buckets, config.relative_distance, config.heads)
        initialise(self, config.depth)

    def forward(
        self,
        x_BTD: Tensor,
        layout: Layout,
        cache: KVCache | None = None,
        memory: Memory | None = None,
        read_K: Tensor | None = None,
    ) -> Tensor:
        """Run the stack.

        Args:
            x_BTD: token states, positions already added unless rotary.
            layout: who may attend to whom; with a cache it is causal and describes the new tokens.
            cache: read and filled in place; rows grow by their valid new tokens.
            memory: what cross-attending blocks look at; None skips them, or takes what the cache remembers.
            read_K: places of the flattened valid tokens whose states are wanted: the last block computes no others.
                Not with a cache or with dropping.

        Returns:
            States of the same shape and dtype; with ``read_K`` those of its tokens, ``[K, D]``.

        Raises:
            ConfigError: if the layout, the cache or the memory does not fit.
        """
        layout.check(*x_BTD.shape[:2])
        if read_K is not None and (cache is not None or layout.dropping is not None):
            raise ConfigError("read_K: found a cache or dropping beside it, expected a pass over whole sequences")
        if memory is not None and self.config.cross_width is None:
            raise ConfigError("found a memory, expected none: this transformer has no cross-attention; set cross_width")
        is_whole = cache is None and memory is None and layout.dropping is None
        if is_whole and (valid := layout.without_padding()) is not None:
            return self._unpadded(x_BTD, *valid, read_K)
        step = self.step(x_BTD, layout, cache)
        if cache is not None:
            memory = cache.remember(memory)
        cut = Cut(step, x_BTD.shape[1], len(self.blocks))
        if cut.after < len(self.blocks) and (memory is not None or self.config.window is not None):
            raise ConfigError("drop_media: found cross-attention or a window, expected a decoder without")
        last = len(self.blocks) - 1 if read_K is not None and self._reads_early(memory) else None
        for layer in range(len(self.blocks)):
            x_BTD, step = cut.before(layer, x_BTD)
            x_BTD = self.run_block(layer, x_BTD, step, memory, read_K if layer == last else None)
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        if read_K is not None:
            return (x_BTD if last is not None else chosen(x_BTD, read_K))[0]
        return cut.end(x_BTD)

    def _reads_early(self, memory: Memory | None) -> bool:
        """Whether what follows the last block's attention treats every token alone."""
        is_alone = self.config.norm != "batch" and len(self.blocks) > 0
        return is_alone and (memory is None or self.blocks[-1].cross_attention is None)

    def _unpadded(self, x_BTD: Tensor, layout: Layout, index_N: Tensor, read_K: Tensor | None) -> Tensor:
        """Run the stack over the valid tokens alone; padding comes out as zeros."""
        x_ND = x_BTD.flatten(0, 1)
        if read_K is not None:
            place = torch.empty(len(x_ND), dtype=torch.int64, device=x_ND.device)
            place[index_N] = torch.arange(len(index_N), device=x_ND.device)
            read: Tensor = self(x_ND.index_select(0, index_N)[None], layout, read_K=place[read_K])
            return read
        states_ND: Tensor = self(x_ND.index_select(0, index_N)[None], layout)[0]
        return states_ND.new_zeros(x_ND.shape).index_copy(0, index_N, states_ND).view(x_BTD.shape)

    def new_cache(self, rows: int, max_tokens: int) -> KVCache:
        """An empty cache for this transformer, on its device, in its dtype."""
        config = self.config
        weight = next(self.parameters())
        return KVCache(
            config.depth, rows, config.num_kv_heads, max_tokens, config.size_of_head, weight.dtype, weight.device
        )

    def run_block(
        self, layer: int, x_BTD: Tensor, step: Step, memory: Memory | None = None, read_K: Tensor | None = None
    ) -> Tensor:
        """One block, recomputed in the backward pass where ``checkpointing`` asks for it."""
        block = self.blocks[layer]
        if step.wide is not None and layer < self.config.window_from:
            step = step.wide
        out: Tensor
        if self.checkpointing and torch.is_grad_enabled() and (step.cache is None or step.cache.is_pure):
            out = checkpoint(block, x_BTD, step, layer, memory, read_K, use_reentrant=False)
        else:
            out = block(x_BTD, step, layer, memory, read_K)
        return out

    def step(self, x_BTD: Tensor, layout: Layout, cache: KVCache | None = None) -> Step:
        """What all layers of one pass share; for callers that run the blocks themselves with :meth:`run_block`."""
        tokens, theta = x_BTD.shape[1], self.config.rope_theta
        if cache is not None:
            is_prefixed = layout.is_causal_T is not None and not cache.length and not cache.num_virtual
            if not (layout.causal or is_prefixed) or layout.segment_lengths is not None:
                raise ConfigError("found a cache with a packed or bidirectional layout, expected causal padded rows")
            positions_BT, mask, is_first = cache.begin(tokens)
            mask = layout.mask if is_prefixed else mask
            is_causal = is_first and mask is None
        else:
            positions_BT, mask, is_first = layout.positions(tokens, x_BTD.device), layout.mask, False
            is_causal = layout.causal and mask is None
        rope = layout.rope
        if theta is not None:
            scaling = self.config.rope_scaling
            rope = rope_tables(positions_BT, self.config.size_of_head, theta, x_BTD.dtype, scaling)
        if self.relative is not None:
            mask, is_causal = self._relative_mask(layout, positions_BT, mask, is_causal, cache), False
        step = Step(layout, rope, mask, is_causal, cache, is_first)
        if self.config.window is None:
            return step
        mask, is_causal = self._windowed(layout, positions_BT, mask, is_causal, cache)
        return replace(step, mask=mask, is_causal=is_causal, wide=step if self.config.window_from else None)

    def _windowed(
        self, layout: Layout, positions_BT: Tensor, mask: Tensor | None, is_causal: bool, cache: KVCache | None
    ) -> tuple[Tensor | None, bool]:
        """The mask and the causal flag where a token sees only its window; unchanged for short sequences."""
        window, num_virtual = self.config.window, 0 if cache is None else cache.num_virtual
        if cache is not None:
            queries_BT, num_keys = positions_BT, cache.num_visible + num_virtual
        else:
            num_keys = positions_BT.shape[1] if layout.segment_lengths is None else max(layout.segment_lengths)
            queries_BT = torch.arange(num_keys, device=positions_BT.device)[None]
        if window is None or num_keys <= window:
            return mask, is_causal
        if not layout.causal:
            raise ConfigError("found a bidirectional layout, expected a causal one: this transformer has a window")
        keys_M = torch.arange(num_keys, device=positions_BT.device)
        ages_BTM = queries_BT[..., None] - keys_M
        near = ((ages_BTM >= 0) & (ages_BTM < window) | (keys_M < num_virtual))[:, None]
        return near if mask is None else near & mask, False

    def _relative_mask(
        self, layout: Layout, positions_BT: Tensor, mask: Tensor | None, is_causal: bool, cache: KVCache | None
    ) -> Tensor:
        """Relative positions and who may attend in one: what is added to the scores, ``[B or 1, H, T, M]``."""
        assert self.relative is not None
        if cache is not None:
            queries_BT, num_keys = positions_BT, cache.num_visible
        else:
            num_keys = positions_BT.shape[1] if layout.segment_lengths is None else max(layout.segment_lengths)
            queries_BT = torch.arange(num_keys, device=positions_BT.device)[None]
        bias: Tensor = self.relative(queries_BT, num_keys, layout.causal)
        if is_causal:
            keys_M = torch.arange(num_keys, device=bias.device)
            bias = bias.masked_fill((keys_M > queries_BT[..., None])[:, None], -torch.inf)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def initialise(module: nn.Module, depth: int) -> None:
    """Set the weights of a part for training from scratch.

    A linear weight is drawn with deviation ``inputs ** -0.5`` (LeCun 1998, Efficient BackProp, section 4.6), an
    embedding with ``width ** -0.5``, both cut at two deviations; biases are 0; projections that end a residual branch
    (``out_proj``, ``down_proj``) are divided by ``sqrt(2 depth)``, so that the sum over all branches keeps its size
    (GPT-2, section 2.3). Norms keep their ones and zeros.

    The usual constant 0.02 fits widths near 2,000. At a width of 128 it makes media tokens so faint that the first
    updates drown them, and the decoder learns to do without (``docs/log.md``).
    """
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Linear | nn.Embedding):
            is_residual = name.endswith(("out_proj", "down_proj"))
            std = inner.weight.shape[1] ** -0.5 / (math.sqrt(2 * max(depth, 1)) if is_residual else 1.0)
            nn.init.trunc_normal_(inner.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(inner, nn.Linear) and inner.bias is not None:
                nn.init.zeros_(inner.bias)


def _norm(config: TransformerConfig) -> nn.Module:
    return build_norm(config.norm, config.width, config.norm_eps, config.bias)


def _attention(config: TransformerConfig, memory_width: int | None) -> Attention:
    has_qk_norm = config.qk_norm if memory_width is None else config.cross_qk_norm
    attention = Attention(
        config.width,
        config.heads,
        config.num_kv_heads,
        config.size_of_head,
        memory_width=memory_width,
        qkv_bias=config.bias if config.qkv_bias is None else config.qkv_bias,
        bias=config.bias,
        dropout=config.dropout,
        extras=AttentionExtras(
            qk_norm=config.norm if has_qk_norm else None,
            norm_eps=config.norm_eps,
            key_bias=config.key_bias,
            scale=config.attention_scale,
            extra_key=config.extra_key and memory_width is None,
        ),
    )
    if config.sub_norm == "both" and memory_width is None:
        width = config.heads * config.size_of_head
        attention.sub_norm = build_norm(config.norm, width, config.norm_eps, config.bias)
    return attention


def _mlp(config: TransformerConfig) -> MLP:
    hidden = config.mlp_dim or 4 * config.width
    sub_norm = None if config.sub_norm == "none" else build_norm(config.norm, hidden, config.norm_eps, config.bias)
    return MLP(config.width, hidden, config.activation, config.gated, config.bias, sub_norm)
