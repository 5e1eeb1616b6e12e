"""The encoder backbone: the tokens of all streams in one bidirectional transformer, or beside one.

Legend: ``S`` samples, ``M`` tokens of one stream, ``T`` tokens of all, ``W`` width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import Look
from polymodal.models.layers import Layout, Memory, Transformer, TransformerConfig, initialise
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.multiway import Multiway, MultiwayConfig

Tokens = Mapping[str, Tensor]


class EncoderBackboneConfig(Config):
    """A bidirectional transformer over the tokens of streams that enter by ``sequence``, one stream after another.

    Streams that enter by ``cross_attention`` stand beside it: its blocks look at them.

    Source: ViLT, arXiv 2102.03334, section 3.1 (one sequence with token types); FLAVA, arXiv 2112.04482, section 3.1
    (``cls``); ALBEF, arXiv 2107.07651, section 3.1, and BLIP, arXiv 2201.12086, section 3.1 (cross-attention); BEiT-3,
    arXiv 2208.10442, section 2.1 (``multiway``).
    """

    use: Literal["encoder"] = "encoder"
    transformer: TransformerConfig = TransformerConfig()
    """The stack; its width is that of the tokens."""
    order: tuple[str, ...] = ()
    """The streams of the sequence in their order; empty: as the recipe lists them."""
    cls: bool = True
    """Whether a learned token stands in front, whose state speaks for the sample; without, its first token does."""
    token_types: bool = True
    """Whether a learned vector per stream is added to its tokens."""
    input_norm: bool = False
    """Whether tokens are normalised before the first block."""
    pooler: bool = False
    """Whether the state that speaks for the sample goes through a linear map and tanh (BERT)."""
    multiway: MultiwayConfig | None = None
    """Routes tokens to experts by stream."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.transformer.cross_width is not None:
            raise ValueError(
                "transformer.cross_width: follows from the streams that enter by cross_attention; leave it out"
            )
        plain = {"rope_theta": None, "gated": False, "kv_heads": None, "head_dim": None, "qk_norm": False,
                 "pre_norm": True, "branch_norm": False, "layer_scale": None, "relative_buckets": None,
                 "attention_scale": None}  # fmt: skip
        wrong = [name for name, value in plain.items() if getattr(self.transformer, name) != value]
        if self.multiway is not None and wrong:
            raise ValueError(f"a multiway backbone has plain pre-norm blocks; leave transformer.{wrong[0]} out")
        if self.transformer.rope_theta is not None:
            raise ValueError("transformer.rope_theta: tokens bring the positions of their streams; leave it out")
        return self

    @property
    def width(self) -> int:
        """Width of the states."""
        return self.transformer.width

    def looking(self, look: Look) -> EncoderBackboneConfig:
        """The same backbone, its blocks attending to streams that enter by cross-attention.

        Raises:
            ConfigError: if the blocks are multiway.
        """
        if self.multiway is not None:
            raise ConfigError(
                "backbone.multiway: its blocks cannot look at other streams; let them enter by 'sequence'"
            )
        more = {
            "cross_width": look.width,
            "cross_every": look.every,
            "cross_gate": look.gate,
            "cross_qk_norm": look.qk_norm,
        }
        return self.model_copy(update={"transformer": self.transformer.model_copy(update=more)})

    def build(self, streams: Collection[str]) -> EncoderBackbone:
        """The module, with random weights.

        Args:
            streams: those of the sequence.

        Raises:
            ConfigError: if ``order`` or ``multiway`` does not name exactly them.
        """
        return EncoderBackbone(self, tuple(streams))


@dataclass(frozen=True, slots=True)
class JointStates:
    """What the backbone gives.

    Args:
        x: per stream of the sequence that is there, its states ``[S, M, W]``.
        is_valid: bool ``[S, M]`` likewise.
        pooled_SW: one state per sample: of the ``cls`` token, or of its first token; after the pooler if there is one.
    """

    x: dict[str, Tensor]
    is_valid: dict[str, Tensor]
    pooled_SW: Tensor


class EncoderBackbone(nn.Module):
    """See :class:`EncoderBackboneConfig`.

    Args:
        config: of the backbone.
        streams: those of the sequence.
    """

    def __init__(self, config: EncoderBackboneConfig, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.order = config.order or streams
        for what, names in (("order", self.order), ("multiway.experts", config.multiway and config.multiway.experts)):
            if names is not None and sorted(names) != sorted(streams):
                raise ConfigError(
                    f"backbone.{what}: found {list(names)}, expected each stream of the sequence once: {list(streams)}"
                )
        width = config.width
        self.cls_token = nn.Parameter(torch.randn(width) * width**-0.5) if config.cls else None
        self.token_types: nn.ParameterDict | None = None
        if config.token_types:
            self.token_types = nn.ParameterDict(
                {name: nn.Parameter(torch.randn(width) * width**-0.5) for name in self.order}
            )
        self.input_norm = nn.LayerNorm(width, eps=config.transformer.norm_eps) if config.input_norm else None
        self.transformer: nn.Module = (
            Transformer(config.transformer)
            if config.multiway is None
            else Multiway(config.transformer, config.multiway)
        )
        self.pooler = nn.Linear(width, width) if config.pooler else None
        if self.pooler is not None:
            initialise(self.pooler, 1)

    def forward(
        self, tokens: Tokens, is_valid: Tokens, memory: Memory | None = None, causal: Collection[str] = ()
    ) -> JointStates:
        """Run the tokens of some streams; a stream that is not given changes nothing.

        Args:
            tokens: per stream of the sequence, ``[S, M, W]``.
            is_valid: bool ``[S, M]`` likewise; samples without the stream have no valid token.
            memory: what cross-attention looks at, a row per sample; None: blocks do without.
            causal: streams whose tokens see only what stands before them, and are seen by nothing before them: all
                other tokens are their prefix.

        Raises:
            ConfigError: if no stream of the sequence is given.
        """
        names = [name for name in self.order if name in tokens]
        if not names:
            raise ConfigError(f"encoder backbone: found tokens of {sorted(tokens)}, expected some of {self.order}")
        x_STW = torch.cat([self._typed(name, tokens[name]) for name in names], dim=1)
        valid_ST = torch.cat([is_valid[name] for name in names], dim=1)
        lengths = [tokens[name].shape[1] for name in names]
        if self.cls_token is not None:
            x_STW = torch.cat([self.cls_token.to(x_STW.dtype).expand(len(x_STW), 1, -1), x_STW], dim=1)
            valid_ST = torch.cat([valid_ST.new_ones(len(x_STW), 1), valid_ST], dim=1)
        if self.input_norm is not None:
            x_STW = self.input_norm(x_STW)
        places = [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]
        places = [names[0]] * (self.cls_token is not None) + places
        layout = _layout(valid_ST, torch.tensor([name in causal for name in places], device=x_STW.device))
        x_STW = self._run(x_STW, layout, places, memory)
        first = int(self.cls_token is not None)
        states = dict(zip(names, torch.split(x_STW[:, first:], lengths, dim=1), strict=True))
        pooled_SW = x_STW[:, 0] if first else x_STW[torch.arange(len(x_STW)), valid_ST.int().argmax(1)]
        if self.pooler is not None:
            pooled_SW = torch.tanh(self.pooler(pooled_SW))
        return JointStates(states, {name: is_valid[name] for name in names}, pooled_SW)

    @property
    def can_write(self) -> bool:
        """Whether :meth:`write` works: the stack is a plain one, to which the order of the tokens says nothing."""
        return isinstance(self.transformer, Transformer) and self.config.transformer.relative_buckets is None

    def new_cache(self, rows: int, max_tokens: int) -> KVCache:
        """An empty cache for :meth:`write`, for so many tokens of all streams."""
        assert isinstance(self.transformer, Transformer)
        return self.transformer.new_cache(rows, max_tokens + (self.cls_token is not None))

    def write(
        self, name: str, x_STW: Tensor, cache: KVCache, tokens: Tokens | None = None, memory: Memory | None = None
    ) -> Tensor:
        """States ``[S, T, W]`` of the next tokens of a causal stream; keys and values of those before are kept.

        Args:
            name: the stream.
            x_STW: its new tokens.
            cache: what was read before; if it is empty, ``tokens`` are read first.
            tokens: those of the other streams of the sequence, all of them valid.
            memory: what cross-attention looks at.
        """
        parts, is_causal = [self._typed(name, x_STW)], [True] * x_STW.shape[1]
        if not cache.length:
            before = {n: tokens[n] for n in self.order if tokens and n in tokens}
            if self.cls_token is not None:
                # It belongs to the first stream, as in `forward`.
                first = next(n for n in self.order if n == name or n in before)
                parts.insert(0, self.cls_token.to(x_STW.dtype).expand(len(x_STW), 1, -1))
                is_causal.insert(0, first == name)
            parts = [*(self._typed(n, x) for n, x in before.items()), *parts]
            is_causal = [False] * sum(x.shape[1] for x in before.values()) + is_causal
        read_STW = torch.cat(parts, dim=1)
        if self.input_norm is not None:
            read_STW = self.input_norm(read_STW)
        layout = Layout(causal=True)
        if not cache.length:
            is_valid_ST = torch.ones(read_STW.shape[:2], dtype=torch.bool, device=read_STW.device)
            layout = Layout.prefixed(is_valid_ST, torch.tensor(is_causal, device=read_STW.device))
        states_STW: Tensor = self.transformer(read_STW, layout, cache, memory)
        return states_STW[:, -x_STW.shape[1] :]

    def _typed(self, name: str, x_SMW: Tensor) -> Tensor:
        return x_SMW if self.token_types is None else x_SMW + self.token_types[name].to(x_SMW.dtype)

    def _run(self, x_STW: Tensor, layout: Layout, places: list[str], memory: Memory | None) -> Tensor:
        out: Tensor
        if self.config.multiway is None:
            out = self._beside(x_STW, layout, memory)
            return out
        multiway = self.config.multiway
        expert_T = torch.tensor([multiway.names.index(multiway.experts[name]) for name in places], device=x_STW.device)
        out = self.transformer(x_STW, layout, expert_T.expand(x_STW.shape[:2]))
        return out

    def _beside(self, x_STW: Tensor, layout: Layout, memory: Memory | None) -> Tensor:
        """Rows with something to look at and rows without run apart: a row alone and beside others comes out alike.

        After the residual sum of a post-norm block stands a norm, so that looking at nothing is not the same as not
        looking.
        """
        has_any_S = None if memory is None or memory.is_valid_BM is None else memory.is_valid_BM.any(1)
        out: Tensor
        if memory is None or has_any_S is None or bool(has_any_S.all()):
            out = self.transformer(x_STW, layout, memory=memory)
            return out
        out = x_STW.new_empty(0)
        for rows_S, seen in ((has_any_S, memory), (~has_any_S, None)):
            index = rows_S.nonzero().squeeze(1)
            if not len(index):
                continue
            part = self.transformer(x_STW[index], _rows(layout, index), memory=seen.select(index) if seen else None)
            if not out.numel():
                out = part.new_zeros(len(x_STW), *part.shape[1:])
            out = out.index_copy(0, index, part)
        return out


def _rows(layout: Layout, index: Tensor) -> Layout:
    valid = layout.is_valid_BT
    return Layout(layout.causal, None if valid is None else valid[index], is_causal_T=layout.is_causal_T)


def _layout(is_valid_ST: Tensor, is_causal_T: Tensor) -> Layout:
    if not bool(is_causal_T.any()):
        return Layout.padded(is_valid_ST, causal=False)
    return Layout.prefixed(is_valid_ST, is_causal_T)
