"""The encoder-decoder backbone: one stack reads what is asked, another looks at it and answers.

Shape legend: ``B`` rows, ``T`` tokens of a row (source, then target), ``N`` tokens of all sources or all targets,
``D`` width, ``S`` samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import CausalBackbone, CausalConfig, Look, batch_layout
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory
from polymodal.models.layers.transformer import Transformer, TransformerConfig

_T5_LIKE: dict[str, Any] = {
    "width": 128,
    "depth": 4,
    "heads": 4,
    "norm": "rms",
    "norm_eps": 1e-6,
    "activation": "relu",
    "bias": False,
    "relative_buckets": 32,
    "attention_scale": 1.0,
}


class EncoderDecoderConfig(CausalConfig):
    """Two stacks (T5-like by default); the second cross-attends to the states of the first in every block.

    Media that enter the ``sequence`` stand in the encoder's; a stream that enters by ``cross_attention`` is looked at
    by the encoder (BLIP's question encoder).

    Source: Vaswani 1706.03762 sec. 3; with the defaults, the choices of T5, 1910.10683 sec. 2.1.
    """

    has_source: ClassVar[bool] = True
    use: Literal["encoder_decoder"] = "encoder_decoder"
    encoder: TransformerConfig = TransformerConfig.parse(_T5_LIKE)
    """The stack that reads."""
    decoder: TransformerConfig = TransformerConfig.parse(_T5_LIKE)
    """Both as wide; ``cross_width`` follows."""
    positions: Literal["relative", "learned"] = "relative"
    """``relative`` is in the stacks (``relative_buckets``); ``learned`` adds a table of ``max_tokens`` positions to the
    embeddings of each side."""
    embed_norm_eps: PositiveFloat | None = None
    """Epsilon of a layer norm after embedding, on each side (BERT); None: no norm."""
    shared: bool = True
    """Whether both sides share one token embedding."""
    chat: str = "t5"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.encoder.width != self.decoder.width:
            raise ValueError(f"encoder and decoder: found widths {self.encoder.width} and {self.decoder.width}")
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            if stack.cross_width is not None:
                raise ValueError(f"{name}.cross_width: follows from the model; leave it out")
            if (self.positions == "relative") != (stack.relative_buckets is not None):
                raise ValueError(
                    f"positions: {self.positions} and {name}.relative_buckets: {stack.relative_buckets} contradict"
                )
        return self

    @property
    def width(self) -> int:
        """Width of the token states."""
        return self.encoder.width

    def looking(self, look: Look) -> Self:
        """The encoder looks at the memory."""
        return self.model_copy(update={"encoder": look.into(self.encoder)})

    def build(self, vocab_size: int) -> EncoderDecoder:
        """The module, with random weights."""
        return EncoderDecoder(self, vocab_size)


class Side(nn.Module):
    """Positions, norm and stack of one side."""

    def __init__(self, config: EncoderDecoderConfig, stack: TransformerConfig) -> None:
        super().__init__()
        self.embed_positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_tokens, config.width)
            nn.init.normal_(self.embed_positions.weight, std=config.width**-0.5)
        eps = config.embed_norm_eps
        self.embed_norm = None if eps is None else nn.LayerNorm(config.width, eps=eps)
        self.transformer = Transformer(stack)

    def forward(
        self, x_BTD: Tensor, layout: Layout, cache: KVCache | None = None, memory: Memory | None = None
    ) -> Tensor:
        """States ``[B, T, D]`` of embedded tokens."""
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(layout.positions(x_BTD.shape[1], x_BTD.device))
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        states: Tensor = self.transformer(x_BTD, layout, cache=cache, memory=memory)
        return states


class EncoderDecoder(CausalBackbone):
    """See :class:`EncoderDecoderConfig`."""

    reuses_prefixes: ClassVar[bool] = False

    def __init__(self, config: EncoderDecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        nn.init.normal_(self.embed_tokens.weight, std=config.width**-0.5)
        self.embed_source: nn.Embedding | None = None
        if not config.shared:
            self.embed_source = nn.Embedding(vocab_size, config.width)
            nn.init.normal_(self.embed_source.weight, std=config.width**-0.5)
        self.encoder = Side(config, config.encoder)
        look = {"cross_width": config.width, "cross_every": 1, "cross_gate": "none"}
        self.decoder = Side(config, config.decoder.model_copy(update=look))

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings of targets ``[B, T, D]``."""
        x_BTD: Tensor = self.embed_tokens(ids_BT)
        return x_BTD

    def embed_batch(self, batch: Batch) -> Tensor:
        """Token embeddings of sources and targets, each from its side's table."""
        x_BTD = self.embed(batch.ids)
        if self.embed_source is None or batch.source_lengths is None:
            return x_BTD
        source, _ = _split(batch_layout(batch), batch.ids)
        is_source = torch.zeros(batch.ids.numel(), dtype=torch.bool, device=batch.ids.device)
        is_source_BT = is_source.index_fill(0, source.index, True).view(batch.ids.shape)
        return torch.where(is_source_BT[..., None], self.embed_source(batch.ids), x_BTD)

    def new_cache(self, rows: int, max_tokens: int) -> KVCache:
        """See :meth:`CausalBackbone.new_cache`; it holds targets, and what the encoder has read as memory."""
        return self.decoder.transformer.new_cache(rows, max_tokens)

    def forward(
        self, x_BTD: Tensor, layout: Layout, cache: KVCache | None = None, memory: Memory | None = None
    ) -> Tensor:
        """Final states ``[B, T, D]``: the encoder's at sources, the decoder's at targets.

        Args:
            x_BTD: embedded sources and targets; with a cache that has read something, targets alone.
            layout: causal, with ``source_lengths`` unless targets continue.
            cache: of the decoder; it remembers the encoder's states.
            memory: what the encoder looks at.

        Raises:
            ConfigError: if nothing says where sources end.
        """
        if cache is not None and cache.length:
            return torch.as_tensor(self.decoder(x_BTD, layout, cache))
        source, target = _split(layout, x_BTD)
        x_ND = x_BTD.flatten(0, 1)
        read = self.encoder(*source.take(x_ND, is_causal=False), None, memory)
        states = self.decoder(*target.take(x_ND, is_causal=True), cache, source.as_memory(read))
        out_ND = source.put(torch.zeros_like(x_ND, dtype=states.dtype), read)
        return target.put(out_ND, states).view(x_BTD.shape)


@dataclass(frozen=True, slots=True)
class _Part:
    """The sources or the targets of a batch that holds both, padded or packed.

    Args:
        lengths: tokens of each sample.
        first: flat place of each sample's first one.
        is_packed: whether samples follow each other in one row.
    """

    lengths: list[int]
    first: Tensor
    is_packed: bool

    @property
    def index(self) -> Tensor:
        """Flat places of all tokens, sample by sample."""
        steps = [torch.arange(length, device=self.first.device) for length in self.lengths]
        return torch.cat([first + step for first, step in zip(self.first, steps, strict=True)])

    @property
    def is_valid(self) -> Tensor:
        """One row for each sample, padded."""
        counts = torch.tensor(self.lengths, device=self.first.device)
        return torch.arange(max(self.lengths), device=self.first.device) < counts[:, None]

    def take(self, x_ND: Tensor, *, is_causal: bool) -> tuple[Tensor, Layout]:
        """The tokens and their layout."""
        taken = x_ND.index_select(0, self.index)
        if self.is_packed:
            return taken[None], Layout.packed(self.lengths, is_causal)
        is_valid = self.is_valid
        padded = taken.new_zeros(*is_valid.shape, taken.shape[1])
        padded[is_valid] = taken
        return padded, Layout.padded(is_valid, is_causal)

    def put(self, x_ND: Tensor, states_BTD: Tensor) -> Tensor:
        """The states of these tokens at their places."""
        flat = states_BTD[0] if self.is_packed else states_BTD[self.is_valid]
        return x_ND.index_copy(0, self.index, flat.to(x_ND.dtype))

    def as_memory(self, states_BTD: Tensor) -> Memory:
        """The states as one row for each sample."""
        is_valid = self.is_valid
        if self.is_packed:
            states_BTD = pad_sequence(list(torch.split(states_BTD[0], self.lengths)), batch_first=True)
        return Memory(states_BTD, None if bool(is_valid.all()) else is_valid)


def _split(layout: Layout, like_BT: Tensor) -> tuple[_Part, _Part]:
    """Sources and targets of ids or embeddings.

    Worked example, packed ``[a b | c] [d | e f]`` with source lengths ``(2, 1)``: sources at ``0 1 3`` in segments
    ``(2, 1)``, targets at ``2 4 5`` in segments ``(1, 2)``. Padded rows ``[a b c]`` and ``[d e f]``: sources
    ``[a b] [d .]`` and targets ``[c .] [e f]``.

    Raises:
        ConfigError: if nothing says where sources end, or a sample lacks one side.
    """
    if layout.source_lengths is None:
        raise ConfigError("encoder_decoder: found a batch without source_lengths, expected what the encoder reads")
    rows, tokens, device = like_BT.shape[0], like_BT.shape[1], like_BT.device
    sources, is_packed = list(layout.source_lengths), layout.segment_lengths is not None
    if layout.segment_lengths is not None:
        wholes = list(layout.segment_lengths)
        first = torch.tensor([0, *wholes[:-1]], device=device).cumsum(0)
    else:
        wholes = [tokens] * rows if layout.is_valid_BT is None else layout.is_valid_BT.sum(1).tolist()
        first = torch.arange(rows, device=device) * tokens
    targets = [whole - source for whole, source in zip(wholes, sources, strict=True)]
    if min(sources) < 1 or min(targets) < 1:
        raise ConfigError(
            f"encoder_decoder: found sources of {sources} and targets of {targets} tokens, expected at least one of "
            "each in every sample"
        )
    after = first + torch.tensor(sources, device=device)
    return _Part(sources, first, is_packed), _Part(targets, after, is_packed)
