"""Stored tables whose rows are not ours one by one, and a temperature that is stored as itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymodal.core.errors import CheckpointError
from polymodal.modalities.text import TextReaderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.presets.architecture import Vocabulary


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a stored table, a parameter of its own here (token types by stream); a ``Change``.

    Args:
        order: which row.
        pieces: how many rows the table has.
    """

    order: int
    pieces: int

    def load(self, stored: Tensor) -> Tensor:
        """The row, as a view.

        Raises:
            CheckpointError: if the table has another number of rows.
        """
        if len(stored) != self.pieces:
            raise CheckpointError(f"found a table of {len(stored)} rows, expected {self.pieces}")
        return stored[self.order]

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """The table."""
        return torch.stack(list(ours))


@dataclass(frozen=True, slots=True)
class After:
    """A stored table that begins with rows nobody reads; they are written as zeros. A ``Change``.

    Args:
        skipped: how many.
    """

    skipped: int
    order: int = 0
    pieces: int = 1

    def load(self, stored: Tensor) -> Tensor:
        """The rows behind them, as a view."""
        return stored[self.skipped :]

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """The table."""
        table = ours[0]
        return torch.cat([table.new_zeros(self.skipped, *table.shape[1:]), table])


@dataclass(frozen=True, slots=True)
class Temperature:
    """A temperature where we hold the logarithm of its inverse; a ``Change``."""

    order: int = 0
    pieces: int = 1

    def load(self, stored: Tensor) -> Tensor:
        """Our logarithm."""
        return -stored.log()

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """The temperature."""
        return (-ours[0]).exp()


def word_rows(model: ModelConfig, vocabulary: Vocabulary) -> int:
    """Rows of the text stream's token embedding: its own, or those of the model's tokenizer."""
    stream = model.streams["text"]
    reader = stream.reader
    has_own = isinstance(reader, TextReaderConfig) and reader.tokenizer is not None
    return int(stream.encoder.vocab_size) if has_own else vocabulary.size
