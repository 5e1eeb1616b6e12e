"""The reader of text streams: text with an encoder of its own (CLIP, ALBEF), as token ids."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import PositiveInt

from polymodal.core.batch import ModelInput
from polymodal.core.errors import CorruptMediaError, LimitError
from polymodal.core.limits import Limits
from polymodal.core.parts import Part, Text
from polymodal.modalities.reader import Reader, ReaderConfig
from polymodal.modalities.text.tokenizer import Tokenizer


class TextReaderConfig(ReaderConfig):
    """How a text becomes the ids of a text encoder."""

    use: Literal["text"] = "text"
    modality: ClassVar[str] = "text"
    max_tokens: PositiveInt = 77
    """Longer texts are cut here, at the end; a text encoder has no media spans that could be cut."""


class TextReader(Reader):
    """Text -> int64 ids ``[L]``, ``1 <= L <= max_tokens``."""

    modality = "text"
    is_ragged = True

    def __init__(self, config: TextReaderConfig, limits: Limits, tokenizer: Tokenizer) -> None:
        super().__init__(config, limits)
        self.config: TextReaderConfig = config
        self.tokenizer = tokenizer

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Ids have no further axis."""
        return ()

    def measure(self, part: Part) -> tuple[int, ...]:
        """The number of ids; text has no header, so it is tokenised."""
        return (len(self._ids(part)),)

    def read(self, part: Part) -> ModelInput:
        """The ids as one unit."""
        ids = np.asarray(self._ids(part), dtype=np.int64)
        return ModelInput([ids], (len(ids),))

    def _ids(self, part: Part) -> list[int]:
        assert isinstance(part, Text)
        if len(part.text) > self.limits.text_chars:
            raise LimitError(
                "text", f"{len(part.text):,} characters, the limit (text_chars) is {self.limits.text_chars:,}"
            )
        ids = self.tokenizer.encode(part.text)[: self.config.max_tokens]
        if not ids:
            raise CorruptMediaError("text", "is empty; a text stream needs at least one token")
        return ids
