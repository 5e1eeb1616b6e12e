"""What every head is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from polymodal.core.config import Config, unknown
from polymodal.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What a head may need to know of the model it is built into.

    Args:
        state_width: width of the backbone's states; None without a backbone.
        vocab_size: size of the tokenizer.
        stream_widths: per stream, the width of its encoder.
        embedding: the backbone's token embedding, for tied heads.
        added_embedding: the rows of the token embedding that stand apart, where there are some.
        own_head: the backbone's own map from states to logits, where it brings one.
        stream_encoders: per stream, its encoder's config.
        token_embeddings: per text stream, its encoder's token embedding, for tied heads.
        query_width: width of the Q-Former that reads texts beside its queries; None without one.
    """

    state_width: int | None
    vocab_size: int
    stream_widths: Mapping[str, int]
    embedding: nn.Embedding | None
    own_head: nn.Module | None = None
    added_embedding: nn.Embedding | None = None
    stream_encoders: Mapping[str, Config] = field(default_factory=dict)
    token_embeddings: Mapping[str, nn.Embedding] = field(default_factory=dict)
    query_width: int | None = None


class HeadConfig(Config):
    """Base of the head configs."""

    use: str

    def build(self, inputs: HeadInputs) -> nn.Module:
        """The head, with random weights."""
        raise NotImplementedError

    def _width(self, inputs: HeadInputs) -> int:
        if inputs.state_width is None:
            raise ConfigError(f"head {self.use}: needs the states of a backbone, and the backbone is 'none'")
        return inputs.state_width

    def _query_width(self, inputs: HeadInputs) -> int:
        """Width of the states of queries and of the words beside them."""
        if inputs.query_width is None:
            raise ConfigError(
                f"head {self.use}: at 'queries' needs one connector with words: true, found none; or leave 'at' out"
            )
        return inputs.query_width

    def _stream_width(self, stream: str, inputs: HeadInputs) -> int:
        """Width of the features of a stream that the head reads, without a backbone."""
        if stream not in inputs.stream_widths:
            raise ConfigError(f"head {self.use}: {unknown('stream', stream, inputs.stream_widths)}")
        return inputs.stream_widths[stream]
