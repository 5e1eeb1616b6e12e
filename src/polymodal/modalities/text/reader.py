"""The reader of text streams: text with an encoder of its own (CLIP, ALBEF), as token ids."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import PositiveInt, model_validator

from polymodal.core.batch import ModelInput
from polymodal.core.config import Config
from polymodal.core.errors import CorruptMediaError, LimitError
from polymodal.core.limits import Limits
from polymodal.core.parts import Part, Text
from polymodal.modalities.reader import Reader, ReaderConfig
from polymodal.modalities.text.tokenizer import Tokenizer


class TokenizerFiles(Config):
    """The tokenizer files of a text tower."""

    path: str
    """A ``tokenizer.json``, a SentencePiece ``.model``, or a folder with tokenizer files of any layout."""
    pad: str | None = None
    """Token that fills; None: what the files name, or else the end token."""
    bos: str | None = None
    """Token that begins a text; None: what the files name."""
    eos: str | None = None
    """Token that ends a text; None: what the files name."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data


class TextReaderConfig(ReaderConfig):
    """How a text becomes the ids of a text encoder."""

    use: Literal["text"] = "text"
    modality: ClassVar[str] = "text"
    max_tokens: PositiveInt = 77
    """Longer texts are cut here, at the end; a text encoder has no media spans that could be cut."""
    tokenizer: TokenizerFiles | None = None
    """The stream's own tokenizer (a path is enough); None: the model's."""
    add_special: bool = False
    """Whether the tokens that the tokenizer itself puts around a text stand around it ([CLS] and [SEP]). One that is
    trained for the recipe has a start and an end where a stream asks for them; captions begin and end with them."""
    fill: bool = False
    """Whether texts are filled up to ``max_tokens`` with the pad token, which the encoder then reads (SigLIP)."""
    bytes: bool = False
    """UTF-8 bytes in place of a tokenizer, as Perceiver IO counts them: each byte plus 6, a 4 in front, a 5 behind."""

    @model_validator(mode="after")
    def _bytes_alone(self) -> Self:
        if self.bytes and (self.tokenizer is not None or self.add_special or self.fill):
            raise ValueError("bytes: true needs no tokenizer; leave tokenizer, add_special and fill out")
        return self


class TextReader(Reader):
    """Text -> int64 ids ``[L]``, ``1 <= L <= max_tokens``.

    Args:
        config: how.
        limits: on the length of texts.
        tokenizer: the stream's own where the config names one, or the model's.
    """

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

    def places(self, part: Text, start: int, end: int) -> list[int]:
        """Places among the ids of :meth:`read` whose tokens hold a character of ``text[start:end]``."""
        if self.config.bytes:
            first, last = (len(part.text[:at].encode()) + 1 for at in (start, end))
            return list(range(first, min(last, self.config.max_tokens - 1)))
        before = len(self.tokenizer.prefix) if self.config.add_special else 0
        after = len(self.tokenizer.suffix) if self.config.add_special else 0
        spans = self.tokenizer.spans(part.text)[: max(0, self.config.max_tokens - before - after)]
        return [before + place for place, (first, last) in enumerate(spans) if first < end and last > start]

    def _ids(self, part: Part) -> list[int]:
        assert isinstance(part, Text)
        if len(part.text) > self.limits.text_chars:
            raise LimitError(
                "text", f"{len(part.text):,} characters, the limit (text_chars) is {self.limits.text_chars:,}"
            )
        if self.config.bytes:
            return [4, *(byte + 6 for byte in part.text.encode()[: max(0, self.config.max_tokens - 2)]), 5]
        own = self.tokenizer
        before, after = (own.prefix, own.suffix) if self.config.add_special else ([], [])
        room = max(0, self.config.max_tokens - len(before) - len(after))
        ids = [*before, *own.encode(part.text)[:room], *after]
        if self.config.fill:
            ids += [own.pad_id] * (self.config.max_tokens - len(ids))
        if not ids:
            raise CorruptMediaError("text", "is empty; a text stream needs at least one token")
        return ids
