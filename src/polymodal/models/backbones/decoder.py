"""The decoder backbone: token embedding and a causal transformer.

Shape legend: ``B`` rows, ``T`` tokens, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from polymodal.core.batch import Batch
from polymodal.core.config import Config
from polymodal.modalities.text import chat_format
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.layout import Layout
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


class DecoderConfig(Config):
    """A causal language model's body (Llama-like by default); the vocabulary comes from the tokenizer.

    Source: Vaswani 1706.03762 sec. 3; with the defaults, the choices of Touvron 2302.13971 sec. 2.2.
    """

    use: Literal["decoder"] = "decoder"
    transformer: TransformerConfig = TransformerConfig.parse({**_LLAMA_LIKE, "rope_theta": 10_000.0})
    """The stack; ``rope_theta`` follows from ``positions`` where it is not given."""
    chat: str = "turns"
    """Name of the chat format."""
    max_tokens: PositiveInt = 1024
    """Longest sequence, media tokens included."""
    positions: Literal["rope", "learned"] = "rope"
    """``learned`` adds a table of ``max_tokens`` positions to the embeddings (GPT-2); ``rope`` turns queries, keys."""

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

    @field_validator("chat")
    @classmethod
    def _known(cls, name: str) -> str:
        return chat_format(name).name

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.positions == "rope") != (self.transformer.rope_theta is not None):
            raise ValueError(
                f"positions: {self.positions} and transformer.rope_theta: {self.transformer.rope_theta} contradict "
                "each other; leave rope_theta out"
            )
        if self.transformer.cross_width is not None:
            raise ValueError("transformer.cross_width: no stream enters a decoder by cross-attention; leave it out")
        return self

    @property
    def width(self) -> int:
        """Width of the token states."""
        return self.transformer.width

    def build(self, vocab_size: int) -> Decoder:
        """The module, with random weights."""
        return Decoder(self, vocab_size)


class Decoder(nn.Module):
    """Embeds token ids and runs the causal stack; logits are the next-token head's work."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        nn.init.normal_(self.embed_tokens.weight, std=config.width**-0.5)
        self.embed_positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_tokens, config.width)
            nn.init.normal_(self.embed_positions.weight, std=config.width**-0.5)
        self.transformer = Transformer(config.transformer)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings ``[B, T, D]``, without positions: media tokens are written over the placeholders first."""
        x_BTD: Tensor = self.embed_tokens(ids_BT)
        return x_BTD

    def forward(self, x_BTD: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """Final states ``[B, T, D]``.

        Args:
            x_BTD: embedded sequence; ``layout`` carries its positions.
            layout: which tokens may attend to which.
            cache: keys and values of earlier tokens; extended in place.
        """
        if self.embed_positions is not None:
            assert layout.positions_BT is not None
            x_BTD = x_BTD + self.embed_positions(layout.positions_BT)
        states_BTD: Tensor = self.transformer(x_BTD, layout, cache=cache)
        return states_BTD


def batch_layout(batch: Batch) -> Layout:
    """The causal layout of a batch: packed or padded."""
    if batch.segment_lengths is not None:
        return Layout.packed(batch.segment_lengths, causal=True, positions_BT=batch.positions)
    return Layout.padded(batch.is_valid, causal=True, positions_BT=batch.positions)


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
        lengths = torch.tensor(batch.segment_lengths, device=flat.device)
        samples = torch.repeat_interleave(torch.arange(len(lengths), device=flat.device), lengths)[flat]
    else:
        samples = flat // batch.ids.shape[1]
    return flat - 1, targets, samples
