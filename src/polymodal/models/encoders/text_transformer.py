"""A transformer over token ids. Legend: ``U`` texts, ``L`` tokens, ``D`` width."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.text import TextReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, LearnedPositions, Transformer, initialise
from polymodal.models.layers.convolution import valid_mask


class TextTransformerConfig(TransformerEncoderConfig):
    """Token and position embeddings, then a transformer.

    Source: CLIP's text tower (causal, pool ``last``), arXiv 2103.00020, section 2.4; BERT (bidirectional, ``cls``),
    arXiv 1810.04805, section 3, with norms before each sublayer.
    """

    use: Literal["text_transformer"] = "text_transformer"
    modality: ClassVar[str] = "text"
    vocab_size: int = Field(default=512, ge=1)
    """Number of token ids; that of the tokenizer."""
    max_tokens: int = Field(default=77, ge=1)
    """Longest text, and where the default reader cuts."""
    causal: bool = False
    """Whether a token sees only itself and earlier ones."""
    pool: Literal["mean", "last", "cls"] = "mean"
    """Mean of the tokens, the last valid token, or a learned token in front (not a feature; not with ``causal``)."""

    @model_validator(mode="after")
    def _cls_sees_the_text(self) -> Self:
        if self.causal and self.pool == "cls":
            raise ValueError(
                "a causal text transformer's first token sees nothing; found pool cls, expected last or mean"
            )
        return self

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

    def build(self) -> TextTransformer:
        """The module."""
        return TextTransformer(self)


class TextTransformer(Encoder):
    """See :class:`TextTransformerConfig`."""

    config: TextTransformerConfig

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        initialise(self.token_embed, 1)
        self.positions = LearnedPositions(config.max_tokens, config.width)
        self.cls_token = nn.Parameter(torch.randn(config.width) * config.width**-0.5) if config.pool == "cls" else None
        self.transformer = Transformer(config.stack())

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode ids ``[U, L]``, int64.

        Raises:
            ConfigError: if a text is longer than ``max_tokens``.
        """
        self.require_shape(values)
        num_units, length = values.shape
        if length > self.config.max_tokens:
            raise ConfigError(
                f"text encoder: found a text of {length} tokens, expected at most {self.config.max_tokens}; "
                "raise the encoder's max_tokens or lower the reader's"
            )
        is_valid_UL = valid_mask(lengths_U, length)
        x_ULD = self.token_embed(values) + self.positions.first(length)
        if self.cls_token is not None:
            x_ULD = torch.cat((self.cls_token.expand(num_units, 1, -1), x_ULD), dim=1)
            with_cls = torch.cat((is_valid_UL.new_ones(num_units, 1), is_valid_UL), dim=1)
            x_ULD = self.transformer(x_ULD, Layout.padded(with_cls, causal=False))
            return finish(x_ULD[:, 1:], is_valid_UL, x_ULD[:, 0])
        x_ULD = self.transformer(x_ULD, Layout.padded(is_valid_UL, self.config.causal))
        if self.config.pool == "mean":
            return finish(x_ULD, is_valid_UL)
        rows_U = torch.arange(num_units, device=values.device)
        return finish(x_ULD, is_valid_UL, x_ULD[rows_U, (lengths_U - 1).clamp(min=0)])
