"""A transformer over token ids. Legend: ``U`` texts, ``L`` tokens, ``D`` width."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.text import TextReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, LearnedPositions, Transformer, TransformerConfig, initialise
from polymodal.models.layers.convolution import valid_mask


class TextTransformerConfig(TransformerEncoderConfig):
    """Token and position embeddings, then a transformer.

    Source: CLIP's text tower (causal, pool ``last``), arXiv 2103.00020, section 2.4; BERT (``pre_norm: false``,
    ``embed_norm: true``, ``segments: 2``, pool ``first``), arXiv 1810.04805, section 3.
    """

    use: Literal["text_transformer"] = "text_transformer"
    modality: ClassVar[str] = "text"
    vocab_size: int = Field(default=512, ge=1)
    """Number of token ids; that of the tokenizer."""
    max_tokens: int = Field(default=77, ge=1)
    """Longest text, and where the default reader cuts."""
    first_position: int = Field(default=0, ge=0)
    """Position of the first token; the rows before it are never read (RoBERTa: 2)."""
    causal: bool = False
    """Whether a token sees only itself and earlier ones."""
    pre_norm: bool = True
    """Whether norms stand before each sublayer, or after the residual sum (BERT)."""
    embed_norm: bool = False
    """Whether the sum of the embeddings is normalised (BERT)."""
    segments: int = Field(default=0, ge=0)
    """Rows of a table of segments (BERT: 2), of which the first is added to every token; 0: none."""
    norm_features: bool = True
    """Whether the last norm is for all features, or for the pooled vector alone (FLAVA); with norms first."""
    pool: Literal["mean", "last", "cls", "first", "eos", "highest"] = "mean"
    """Mean of the tokens, the last valid token, a learned token in front (not a feature; not with ``causal``), the
    first token (BERT's [CLS]), the first whose id is ``eos_id``, or the first that has the highest id (CLIP's, whose
    end token has it)."""
    eos_id: int | None = Field(default=None, ge=0)
    """Id of the end token, for ``pool: eos``."""
    pooled_proj: int | None = Field(default=None, ge=1)
    """Width of a linear map of the pooled vector (SigLIP); None: no map."""
    pooled_tanh: bool = False
    """Whether that map ends in a hyperbolic tangent (BERT's pooler)."""

    @model_validator(mode="after")
    def _cls_sees_the_text(self) -> Self:
        if self.causal and self.pool in ("cls", "first"):
            raise ValueError(
                f"a causal text transformer's first token sees nothing; found pool {self.pool}, expected last or mean"
            )
        if (self.pool == "eos") != (self.eos_id is not None):
            raise ValueError("'eos_id' belongs to pool: eos, and pool: eos needs it")
        if not self.norm_features and (not self.pre_norm or self.pool in ("mean", "cls")):
            raise ValueError("'norm_features: false' goes with norms first and the state of a token as pooled vector")
        if self.pooled_tanh and self.pooled_proj is None:
            raise ValueError("'pooled_tanh' belongs to 'pooled_proj'; set its width, or leave it out")
        return self

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config; with norms last there is no further one at the end."""
        stack = super().stack(depth, final_norm and self.pre_norm and self.norm_features)
        return stack.model_copy(update={"pre_norm": self.pre_norm})

    @property
    def pooled_width(self) -> int:
        """That of the linear map where there is one."""
        return self.pooled_proj or self.width

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
        self.positions = LearnedPositions(config.first_position + config.max_tokens, config.width)
        self.cls_token = nn.Parameter(torch.randn(config.width) * config.width**-0.5) if config.pool == "cls" else None
        self.segments = nn.Embedding(config.segments, config.width) if config.segments else None
        if self.segments is not None:
            initialise(self.segments, 1)
        self.embed_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.embed_norm else None
        self.transformer = Transformer(config.stack())
        self.pooled_norm = None if config.norm_features else nn.LayerNorm(config.width, eps=config.norm_eps)
        self.pooled_proj = nn.Linear(config.width, config.pooled_proj) if config.pooled_proj else None
        if self.pooled_proj is not None:
            initialise(self.pooled_proj, 1)

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
        first = self.config.first_position
        x_ULD = self.token_embed(values) + self.positions.first(first + length)[first:]
        if self.segments is not None:
            x_ULD = x_ULD + self.segments.weight[0]
        if self.embed_norm is not None:
            x_ULD = self.embed_norm(x_ULD)
        if self.cls_token is not None:
            x_ULD = torch.cat((self.cls_token.expand(num_units, 1, -1), x_ULD), dim=1)
            with_cls = torch.cat((is_valid_UL.new_ones(num_units, 1), is_valid_UL), dim=1)
            x_ULD = self.transformer(x_ULD, Layout.padded(with_cls, causal=False))
            features = finish(x_ULD[:, 1:], is_valid_UL, x_ULD[:, 0])
        else:
            x_ULD = self.transformer(x_ULD, Layout.padded(is_valid_UL, self.config.causal))
            features = finish(x_ULD, is_valid_UL, self._pool(x_ULD, values, is_valid_UL))
        if self.pooled_proj is None:
            return features
        pooled_UD = self.pooled_proj(features.pooled_UD)
        return Features(
            features.x_UND, features.is_valid_UN, pooled_UD.tanh() if self.config.pooled_tanh else pooled_UD
        )

    def _pool(self, x_ULD: Tensor, ids_UL: Tensor, is_valid_UL: Tensor) -> Tensor | None:
        """The state of one token of each text; None for their mean."""
        pool = self.config.pool
        if pool == "mean":
            return None
        if pool == "first":
            place_U = torch.zeros(len(x_ULD), dtype=torch.int64, device=x_ULD.device)
        elif pool == "last":
            place_U = (is_valid_UL.sum(dim=1) - 1).clamp(min=0)
        elif pool == "eos":
            place_U = ((ids_UL == self.config.eos_id) & is_valid_UL).int().argmax(dim=1)
        else:
            place_U = ids_UL.masked_fill(~is_valid_UL, -1).argmax(dim=1)
        pooled_UD = x_ULD[torch.arange(len(x_ULD), device=x_ULD.device), place_U]
        return pooled_UD if self.pooled_norm is None else self.pooled_norm(pooled_UD)

    def normed(self, features: Features) -> Tensor:
        """See :meth:`Encoder.normed`."""
        norm = self.pooled_norm
        return features.x_UND if norm is None else torch.as_tensor(norm(features.x_UND))
