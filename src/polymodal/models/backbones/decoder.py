"""The decoder backbone: token embedding and a causal transformer.

Shape legend: ``B`` rows, ``T`` tokens, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from polymodal.core.batch import Batch
from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.modalities.text import ChatTemplate, chat_format
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory
from polymodal.models.layers.transformer import Transformer, TransformerConfig

_LLAMA_LIKE = {
    "width": 128,
    "depth": 4,
    "heads": 4,
    "norm": "rms",
    "activation": "silu",
    "gated": True,
    "bias": False,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How the blocks of a stack look at a memory; see :class:`~polymodal.models.entries.table.CrossAttentionEntry`.

    Args:
        width: of the memory.
        every: blocks 0, n, 2n, ... look.
        gate: ``none``, ``tanh`` or ``tanh_channel``.
        qk_norm: whether queries and keys are normalised per head.
    """

    width: int
    every: int
    gate: str
    qk_norm: bool

    def into(self, config: TransformerConfig) -> TransformerConfig:
        """The stack with such blocks."""
        look = {"cross_width": self.width, "cross_every": self.every, "cross_gate": self.gate}
        return config.model_copy(update={**look, "cross_qk_norm": self.qk_norm})


class CausalConfig(Config, ABC):
    """Base of the backbones that read a sequence from left to right and say what comes next."""

    has_source: ClassVar[bool] = False
    """Whether what is asked goes to an encoder of its own."""
    use: str
    chat: str | ChatTemplate = "turns"
    """Name of the chat format, or a checkpoint's own template."""
    max_tokens: PositiveInt = 1024
    """Longest sequence, media tokens included."""
    stop_ids: tuple[NonNegativeInt, ...] = ()
    """Ids that end an answer besides the end token of the chat format."""

    @field_validator("chat")
    @classmethod
    def _known(cls, chat: str | ChatTemplate) -> str | ChatTemplate:
        chat_format(chat)
        return chat

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the token embeddings, which connectors give."""

    def looking(self, look: Look) -> Self:
        """This backbone with blocks that cross-attend to a memory.

        Raises:
            ConfigError: if it can have none.
        """
        raise ConfigError(f"backbone {self.use}: no stream can enter it by cross_attention; use a decoder of our own")

    @abstractmethod
    def build(self, vocab_size: int) -> CausalBackbone:
        """The module, with random weights."""


class CausalBackbone(nn.Module, ABC):
    """Base of the modules of :class:`CausalConfig`."""

    reuses_prefixes: ClassVar[bool] = True
    """Whether keys and values of a prompt's beginning serve other prompts that begin alike."""

    @property
    def own_head(self) -> nn.Module | None:
        """States -> logits where the backbone brings its own head; None: the ``next_token`` head does it."""
        return None

    @abstractmethod
    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings ``[B, T, D]``, without positions: media tokens are written over the placeholders first."""

    def embed_batch(self, batch: Batch) -> Tensor:
        """The same for the ids of a batch."""
        return self.embed(batch.ids)

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, layout: Layout, cache: KVCache | None = None, memory: Memory | None = None
    ) -> Tensor:
        """Final states ``[B, T, D]``.

        Args:
            x_BTD: embedded sequence; ``layout`` carries its positions.
            layout: which tokens may attend to which.
            cache: keys and values of earlier tokens; extended in place.
            memory: what streams that enter by cross-attention give; None takes what the cache remembers.
        """

    def read(self, x_BTD: Tensor, layout: Layout, read_K: Tensor, memory: Memory | None = None) -> Tensor:
        """Final states ``[K, D]`` of the valid tokens at these places of the flattened rows, and no more."""
        return torch.flatten(self(x_BTD, layout, None, memory), 0, 1).index_select(0, read_K)

    @abstractmethod
    def new_cache(self, rows: int, max_tokens: int) -> KVCache:
        """An empty cache for this backbone, on its device, in its dtype."""


class DecoderConfig(CausalConfig):
    """A causal language model's body (Llama-like by default); the vocabulary comes from the tokenizer.

    Source: Vaswani 1706.03762 sec. 3; with the defaults, the choices of Touvron 2302.13971 sec. 2.2.
    """

    use: Literal["decoder"] = "decoder"
    transformer: TransformerConfig = TransformerConfig.parse({**_LLAMA_LIKE, "rope_theta": 10_000.0})
    """The stack; ``rope_theta`` follows from ``positions`` where it is not given."""
    positions: Literal["rope", "learned"] = "rope"
    """``learned`` adds a table of ``max_tokens`` positions to the embeddings (GPT-2); ``rope`` turns queries, keys."""
    position_offset: NonNegativeInt = 0
    """Row of the learned table that the first position has (OPT: 2); the rows before it are never read."""
    embed_norm_eps: PositiveFloat | None = None
    """Epsilon of a layer norm of the embedded tokens, positions included (BERT); None: no norm."""
    added_rows: NonNegativeInt = 0
    """How many of the last token ids have embeddings (and rows of the head) that stand apart, so that they can train
    while those of a finished model stay frozen (Idefics)."""
    embed_width: PositiveInt | None = None
    """Width of the token embedding and of the final states, mapped to and from the stack's (OPT 350m); None: its."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """``positions`` decides about rotary codes, so that no decoder is left without any positions by accident."""
        if not isinstance(data, dict):
            return data
        transformer = data.get("transformer", _LLAMA_LIKE)
        if isinstance(transformer, dict) and "rope_theta" not in transformer:
            is_rotary = data.get("positions", "rope") == "rope"
            data = {**data, "transformer": {**transformer, "rope_theta": 10_000.0 if is_rotary else None}}
        return data

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.positions == "rope") != (self.transformer.rope_theta is not None):
            raise ValueError(
                f"positions: {self.positions} and transformer.rope_theta: {self.transformer.rope_theta} contradict "
                "each other; leave rope_theta out"
            )
        if self.position_offset and self.positions != "learned":
            raise ValueError("position_offset belongs to positions: learned; leave it out")
        if self.transformer.cross_width is not None:
            raise ValueError(
                "transformer.cross_width: follows from the streams that enter by cross_attention; leave it out"
            )
        return self

    @property
    def width(self) -> int:
        """Width of the token states."""
        return self.transformer.width

    def looking(self, look: Look) -> Self:
        """See :meth:`CausalConfig.looking`."""
        return self.model_copy(update={"transformer": look.into(self.transformer)})

    def build(self, vocab_size: int) -> Decoder:
        """The module, with random weights."""
        return Decoder(self, vocab_size)


class Decoder(CausalBackbone):
    """Embeds token ids and runs the causal stack; logits are the next-token head's work."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        outer = config.embed_width or config.width
        self.embed_tokens = nn.Embedding(vocab_size - config.added_rows, outer)
        nn.init.normal_(self.embed_tokens.weight, std=outer**-0.5)
        self.embed_added: nn.Embedding | None = None
        if config.added_rows:
            self.embed_added = nn.Embedding(config.added_rows, outer)
            nn.init.normal_(self.embed_added.weight, std=outer**-0.5)
        has_maps = config.embed_width is not None
        self.in_proj = nn.Linear(outer, config.width, bias=False) if has_maps else None
        self.out_proj = nn.Linear(config.width, outer, bias=False) if has_maps else None
        self.embed_positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_tokens + config.position_offset, config.width)
            nn.init.normal_(self.embed_positions.weight, std=config.width**-0.5)
        eps = config.embed_norm_eps
        self.embed_norm = None if eps is None else nn.LayerNorm(config.width, eps=eps)
        self.transformer = Transformer(config.transformer)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """See :meth:`CausalBackbone.embed`."""
        if self.embed_added is None:
            x_BTD: Tensor = self.embed_tokens(ids_BT)
        else:
            first = self.embed_tokens.num_embeddings
            own_BTD, added_BTD = (
                self.embed_tokens(ids_BT.clamp(max=first - 1)),
                self.embed_added((ids_BT - first).clamp(min=0)),
            )
            x_BTD = torch.where((ids_BT < first)[..., None], own_BTD, added_BTD)
        return x_BTD if self.in_proj is None else torch.as_tensor(self.in_proj(x_BTD))

    def forward(
        self, x_BTD: Tensor, layout: Layout, cache: KVCache | None = None, memory: Memory | None = None
    ) -> Tensor:
        """See :meth:`CausalBackbone.forward`."""
        return self._mapped(self.transformer(self._placed(x_BTD, layout), layout, cache=cache, memory=memory))

    def read(self, x_BTD: Tensor, layout: Layout, read_K: Tensor, memory: Memory | None = None) -> Tensor:
        """See :meth:`CausalBackbone.read`."""
        return self._mapped(self.transformer(self._placed(x_BTD, layout), layout, memory=memory, read_K=read_K))

    def _placed(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        if self.embed_positions is not None:
            assert layout.positions_BT is not None
            x_BTD = x_BTD + self.embed_positions(layout.positions_BT + self.config.position_offset)
        return x_BTD if self.embed_norm is None else torch.as_tensor(self.embed_norm(x_BTD))

    def _mapped(self, states: Tensor) -> Tensor:
        return states if self.out_proj is None else torch.as_tensor(self.out_proj(states))

    def new_cache(self, rows: int, max_tokens: int) -> KVCache:
        """See :meth:`CausalBackbone.new_cache`."""
        return self.transformer.new_cache(rows, max_tokens)


def batch_layout(batch: Batch) -> Layout:
    """The causal layout of a batch: packed or padded."""
    if batch.segment_lengths is not None:
        layout = Layout.packed(batch.segment_lengths, causal=True, positions_BT=batch.positions)
    else:
        layout = Layout.padded(batch.is_valid, causal=True, positions_BT=batch.positions)
    return layout if batch.source_lengths is None else replace(layout, source_lengths=batch.source_lengths)


def supervised_index(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Where the targets are: ``(source [K], targets [K], samples [K])``.

    ``source`` are flattened indices of the tokens that predict; since the first token of a sample is never a target,
    the token before a target always belongs to the same sample, packed or padded.

    Worked example, packed ids ``[a b c | d e]`` with targets ``c`` and ``e``: source ``[1 3]``, targets ``[c e]``,
    samples ``[0 1]``.
    """
    flat = batch.is_supervised.reshape(-1).nonzero().squeeze(1)
    targets = batch.ids.reshape(-1)[flat]
    if batch.segment_lengths is not None:
        lengths = torch.tensor(batch.segment_lengths, dtype=torch.int64, device=flat.device)
        samples = torch.repeat_interleave(torch.arange(len(lengths), device=flat.device), lengths)[flat]
    else:
        samples = flat // batch.ids.shape[1]
    return flat - 1, targets, samples
