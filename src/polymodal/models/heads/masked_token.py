"""The head of masked modelling: states at hidden places -> what stood there.

Legend: ``K`` hidden places, ``W`` width of the states, ``V`` outputs.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers import Activation, initialise
from polymodal.models.layers.mlp import activate


class MaskedTokenConfig(HeadConfig):
    """Predicts the hidden tokens, pixels or codes of one stream.

    Source: BERT, arXiv 1810.04805, section 3.1 (``tokens``); SimMIM, arXiv 2111.09886, section 3.3 (``pixels``); BEiT,
    arXiv 2106.08254, section 2.3 (``codes``).
    """

    use: Literal["masked_token"] = "masked_token"
    stream: str = "text"
    """The stream whose places are hidden."""
    at: Literal["backbone", "encoder", "queries"] = "backbone"
    """Which states are read: the backbone's; those of the stream's own encoder (FLAVA's unimodal objectives); or, of a
    text that is generated, those beside a Q-Former's ``queries`` (BLIP-2's first stage)."""
    predicts: Literal["tokens", "pixels", "codes"] = "tokens"
    """``tokens`` of a text, ``pixels`` of a patch, or the ``codes`` that another encoder gives the patch."""
    codec: str | None = None
    """For ``codes``: the stream of the same modality whose encoder gives them (FLAVA's codebook), or ``stream`` itself,
    where its own tokens are codes (VideoBERT)."""
    transform: bool = True
    """Whether a linear map, an activation and a norm come first (BERT)."""
    activation: Activation = "gelu"
    norm_eps: float = Field(default=1e-12, gt=0)
    tied: bool = True
    """Whether the output matrix is the token embedding of the stream's encoder; for ``tokens``."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.predicts == "codes") != (self.codec is not None):
            raise ValueError("'codec' belongs to predicts: codes, and predicts: codes needs it")
        return self

    @property
    def is_tied(self) -> bool:
        """Whether the output matrix is shared."""
        return self.tied and self.predicts == "tokens"

    def build(self, inputs: HeadInputs) -> MaskedTokenHead:
        """The head.

        Raises:
            ConfigError: if its streams are not there, or the stream's encoder does not offer what it predicts.
        """
        width = self._stream_width(self.stream, inputs)
        if self.at == "backbone":
            width = self._width(inputs)
        elif self.at == "queries":
            width = self._query_width(inputs)
        embedding = inputs.token_embeddings.get(self.stream)
        if self.is_tied and (embedding is None or embedding.embedding_dim != width):
            found = "no token embedding" if embedding is None else f"one of width {embedding.embedding_dim}"
            raise ConfigError(
                f"head masked_token: found {found} in stream {self.stream!r}, expected one of the width {width} of the "
                "states to share; set tied: false"
            )
        return MaskedTokenHead(self, width, self._num_outputs(inputs), embedding if self.is_tied else None)

    def _num_outputs(self, inputs: HeadInputs) -> int:
        encoder = inputs.stream_encoders[self.stream]
        if self.predicts == "tokens":
            embedding = inputs.token_embeddings.get(self.stream)
            return inputs.vocab_size if embedding is None else embedding.num_embeddings
        if self.codec is not None:
            if self.codec not in inputs.stream_widths:
                raise ConfigError(f"head masked_token: {unknown('codec stream', self.codec, inputs.stream_widths)}")
            return int(getattr(inputs.stream_encoders[self.codec], "num_codes", inputs.stream_widths[self.codec]))
        patch = getattr(encoder, "patch_size", None)
        if patch is None:
            raise ConfigError(f"head masked_token: the encoder of stream {self.stream!r} has no patches to predict")
        return 3 * int(patch) ** 2


class MaskedTokenHead(nn.Module):
    """States ``[K, W]`` -> logits over tokens or codes, or normalised pixels ``[K, V]``."""

    def __init__(self, config: MaskedTokenConfig, width: int, num_outputs: int, tied: nn.Embedding | None) -> None:
        super().__init__()
        self.config = config
        self.dense = nn.Linear(width, width) if config.transform else None
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.transform else None
        self.proj = nn.Linear(width, num_outputs)
        initialise(self, 1)
        if tied is not None:
            self.proj.weight = tied.weight

    def forward(self, states_KW: Tensor) -> Tensor:
        """Predictions ``[K, V]``."""
        if self.dense is not None and self.norm is not None:
            states_KW = self.norm(activate(self.dense(states_KW), self.config.activation))
        out: Tensor = self.proj(states_KW)
        return out
