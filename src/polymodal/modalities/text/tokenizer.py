"""The tokenizer: a ``tokenizers`` file, with control tokens that ordinary text can never produce."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from polymodal.core.config import unknown
from polymodal.core.errors import CheckpointError, ConfigError

PAD = "<|pad|>"
MEDIA = "<|media|>"
"""The placeholder: one stands wherever one media feature will be."""


class Tokenizer:
    """Text <-> token ids.

    Control tokens (roles, end of turn, the media placeholder) are reached by name only: ``encode`` treats their
    spelling inside a text as plain characters, so no input can forge a turn or a placeholder.

    Args:
        backend: a ``tokenizers.Tokenizer``. It is copied; missing control tokens are added to the copy.
        controls: control tokens that the chat format needs, besides ``<|pad|>`` and ``<|media|>``.
    """

    def __init__(self, backend: tokenizers.Tokenizer, controls: Iterable[str] = ()) -> None:
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        names = [PAD, MEDIA, *controls]
        self._backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in dict.fromkeys(names)])
        self._backend.encode_special_tokens = True
        self._specials = {token.content: id for id, token in self._backend.get_added_tokens_decoder().items()}
        self.pad_id = self.control(PAD)
        self.media_id = self.control(MEDIA)

    @property
    def size(self) -> int:
        """Number of ids, control tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def controls(self) -> dict[str, int]:
        """Every control token and its id."""
        return dict(self._specials)

    def control(self, name: str) -> int:
        """The id of a control token.

        Raises:
            ConfigError: if the tokenizer has no such token.
        """
        if name not in self._specials:
            raise ConfigError(unknown("control token", name, self._specials))
        return self._specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never holds a control token."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, with_controls: bool = False) -> str:
        """The text of ``ids``; control tokens are left out unless asked for."""
        if not with_controls:
            skip = set(self._specials.values())
            ids = [id for id in ids if id not in skip]
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json``."""
        Path(path).write_text(self._backend.to_str(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], controls: Iterable[str] = ()) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            CheckpointError: if the file is missing or is not a tokenizer.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            json.loads(text)
            return cls(tokenizers.Tokenizer.from_str(text), controls)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except Exception as error:  # noqa: BLE001  (the backend raises bare Exception on a bad file)
            raise CheckpointError(f"{path}: is not a tokenizer.json: {error}") from None


class TokenStream:
    """Decodes ids one at a time, holding back bytes of unfinished characters.

    ``push`` returns the text that became certain; the pieces, joined, equal ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = ""

    def push(self, id: int) -> str:
        """Add one id and return the new text, possibly empty."""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What was held back, at the end."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        piece, self._sent = text[len(self._sent) :], text
        return piece


def train_bpe(texts: Iterable[str], vocab_size: int, controls: Iterable[str] = ()) -> Tokenizer:
    """Train a byte-level BPE: every text can be encoded, and decoding gives it back exactly.

    Source: Sennrich 1508.07909; byte-level as in GPT-2. Digits are single tokens.

    Args:
        texts: the corpus.
        vocab_size: ids in all, the 256 bytes and the control tokens included.
        controls: control tokens besides the standard ones.

    Raises:
        ConfigError: if ``vocab_size`` leaves no room for the bytes and the control tokens.
    """
    names = list(dict.fromkeys([PAD, MEDIA, *controls]))
    if vocab_size < 256 + len(names):
        raise ConfigError(
            f"tokenizer.vocab_size: found {vocab_size}, expected at least {256 + len(names)} "
            f"(256 bytes and {len(names)} control tokens)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, names)
