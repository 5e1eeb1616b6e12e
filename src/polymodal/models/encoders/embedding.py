"""Token ids embedded and no more: what a joint encoder reads of a text.

Legend: ``U`` texts, ``L`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.text import TextReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, finish
from polymodal.models.layers import LearnedPositions, initialise
from polymodal.models.layers.convolution import valid_mask


class EmbeddingConfig(EncoderConfig):
    """Token and position embeddings, summed; no token sees another.

    Source: BERT, arXiv 1810.04805, section 3 (``segments: 2``, ``norm: true``).
    """

    use: Literal["embedding"] = "embedding"
    modality: ClassVar[str] = "text"
    vocab_size: int = Field(default=512, ge=1)
    """Number of token ids; that of the tokenizer."""
    max_tokens: int = Field(default=77, ge=1)
    """Longest text, and where the default reader cuts."""
    positions: bool = True
    """Whether a learned vector per position is added."""
    segments: int = Field(default=0, ge=0)
    """Rows of a table of segments (BERT: 2), of which the first is added to every token; 0: none."""
    norm: bool = False
    """Whether the sum is normalised."""
    norm_eps: float = Field(default=1e-12, gt=0)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``()``: ids have no axis but their length."""
        return ()

    def num_features(self, length: int) -> int:
        """One for each token."""
        return length

    def default_reader(self) -> TextReaderConfig:
        """Texts of at most ``max_tokens`` tokens."""
        return TextReaderConfig(max_tokens=self.max_tokens)

    def build(self) -> Embedding:
        """The module."""
        return Embedding(self)


class Embedding(Encoder):
    """See :class:`EmbeddingConfig`; the pooled vector is the mean."""

    config: EmbeddingConfig

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        initialise(self.token_embed, 1)
        self.positions = LearnedPositions(config.max_tokens, config.width) if config.positions else None
        self.segments = nn.Embedding(config.segments, config.width) if config.segments else None
        if self.segments is not None:
            initialise(self.segments, 1)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm else None

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Embed ids ``[U, L]``, int64.

        Raises:
            ConfigError: if a text is longer than ``max_tokens``.
        """
        self.require_shape(values)
        length = values.shape[1]
        if length > self.config.max_tokens:
            raise ConfigError(
                f"text encoder: found a text of {length} tokens, expected at most {self.config.max_tokens}; "
                "raise the encoder's max_tokens or lower the reader's"
            )
        x_ULD = self.token_embed(values)
        if self.positions is not None:
            x_ULD = x_ULD + self.positions.first(length)
        if self.segments is not None:
            x_ULD = x_ULD + self.segments.weight[0]
        if self.norm is not None:
            x_ULD = self.norm(x_ULD)
        return finish(torch.as_tensor(x_ULD), valid_mask(lengths_U, length))
