"""Connectionist temporal classification: one token or a blank for every feature of a stream.

Legend: ``U`` units, ``N`` features, ``I`` items, ``V`` vocabulary, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers.convolution import valid_mask


class CtcConfig(HeadConfig):
    """Logits over characters and a blank for every feature of one stream; no backbone is read.

    Source: Graves et al. 2006, "Connectionist Temporal Classification", section 3.
    """

    use: Literal["ctc"] = "ctc"
    stream: str
    """The stream whose features are read."""
    vocabulary: tuple[str, ...] = Field(min_length=2)
    """The tokens in the order of their ids: characters, and names of more than one character for control tokens."""
    blank: int = Field(default=0, ge=0)
    """Id of the blank."""
    delimiter: str = "|"
    """The token that stands for a space."""
    unknown: str | None = None
    """The token for characters that the vocabulary lacks; None: such a text is refused."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("vocabulary: expected distinct tokens")
        if self.blank >= len(self.vocabulary):
            raise ValueError(f"blank {self.blank} is beyond the {len(self.vocabulary)} tokens of the vocabulary")
        if self.unknown is not None and self.unknown not in self.vocabulary:
            raise ValueError(f"unknown: {self.unknown!r} is not in the vocabulary")
        return self

    def encode(self, text: str) -> list[int]:
        """The ids of a text, character by character, spaces as the delimiter.

        Where the vocabulary has no lower-case letters the text is written in capitals, and the other way round.

        Raises:
            ConfigError: if a character is not in the vocabulary and there is no ``unknown`` token.
        """
        ids = {token: index for index, token in enumerate(self.vocabulary)}
        other = ids.get(self.unknown) if self.unknown is not None else None
        found = []
        for character in text:
            token = self.delimiter if character == " " else character
            options = (ids.get(form) for form in (token, token.upper(), token.lower()))
            index = next((option for option in options if option is not None), other)
            if index is None:
                raise ConfigError(
                    f"head ctc: the character {character!r} of {text[:40]!r} is not among the {len(ids)} tokens of the "
                    "vocabulary; add it, or name an 'unknown' token"
                )
            found.append(index)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a path: repeats count once, blanks are dropped.

        Worked example, ``-`` the blank: ``h h - e l - l l o`` reads ``hello``.
        """
        kept = [index for index, _ in groupby(ids) if index != self.blank]
        tokens = [self.vocabulary[index] for index in kept]
        return "".join(" " if token == self.delimiter else token for token in tokens).strip()

    def build(self, inputs: HeadInputs) -> CtcHead:
        """The head; a stream that is not there is an error."""
        width = self._stream_width(self.stream, inputs)
        encoder = inputs.stream_encoders.get(self.stream)
        return CtcHead(self, getattr(encoder, "width", width))


class CtcHead(nn.Module):
    """Features ``[U, N, D]`` -> logits ``[U, N, V]``."""

    def __init__(self, config: CtcConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(width, len(config.vocabulary))
        nn.init.normal_(self.proj.weight, std=width**-0.5)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_UND: Tensor) -> Tensor:
        """Logits ``[..., V]``."""
        logits: Tensor = self.proj(x_UND)
        return logits


def join_units(x_UNV: Tensor, is_valid_UN: Tensor, unit_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The valid rows of each item's units one after another.

    Worked example: an item of two clips with 3 and 2 valid features has 5 rows.

    Returns:
        ``[I, longest, V]``, zero beyond each item's length, and the lengths ``[I]`` int64.
    """
    if all(count == 1 for count in unit_counts):
        return x_UNV, is_valid_UN.sum(dim=1)
    items = [
        torch.cat([row[valid] for row, valid in zip(rows, masks, strict=True)])
        for rows, masks in zip(
            torch.split(x_UNV, list(unit_counts)), torch.split(is_valid_UN, list(unit_counts)), strict=True
        )
    ]
    lengths_I = torch.tensor([len(item) for item in items], device=x_UNV.device)
    return nn.utils.rnn.pad_sequence(items, batch_first=True), lengths_I


def greedy_paths(logits_INV: Tensor, lengths_I: Tensor) -> list[list[int]]:
    """The likeliest token of every valid feature, item by item."""
    best_IN = logits_INV.argmax(dim=-1).masked_fill(~valid_mask(lengths_I, logits_INV.shape[1]), -1)
    return [row[:length] for row, length in zip(best_IN.tolist(), lengths_I.tolist(), strict=True)]
