"""The tokenizer: a ``tokenizers`` file, with control tokens that ordinary text can never produce."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.modalities.text.files import read_backend, read_names

PAD = "<|pad|>"
MEDIA = "<|media|>"
"""The placeholder: one stands wherever one media feature will be."""
START = "{start}"
"""In a chat format: whatever the tokenizer itself puts before a text (its start token, or nothing)."""
END = "{end}"
"""In a chat format: the tokenizer's own end token."""
OWN_START, OWN_END = "<|start|>", "<|end|>"
"""What a tokenizer trained here calls its start and its end."""


@dataclass(frozen=True, slots=True)
class TokenNames:
    """What a tokenizer calls its control tokens; None where it has none.

    Args:
        pad: fills rows of a batch; it is masked everywhere, so that any token serves.
        media: the placeholder of media. Its embedding is written over, so that any token serves here too.
        bos: begins a text.
        eos: ends a text.
    """

    pad: str | None = None
    media: str | None = None
    bos: str | None = None
    eos: str | None = None


class Tokenizer:
    """Text <-> token ids.

    Control tokens (roles, end of turn, the media placeholder) are reached by name only: ``encode`` treats their
    spelling inside a text as plain characters, so no input can forge a turn or a placeholder.

    Args:
        backend: a ``tokenizers.Tokenizer``. It is copied.
        controls: control tokens that are added to the copy where they are missing.
        names: what a published tokenizer calls its control tokens; nothing but ``controls`` is added to it then.
            None, for a tokenizer of our own, adds ``<|pad|>`` and ``<|media|>`` as well.

    Raises:
        ConfigError: if ``names`` names a token that is not there.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, controls: Iterable[str] = (), names: TokenNames | None = None
    ) -> None:
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        if names is None:
            names, controls = TokenNames(PAD, MEDIA, None, None), [PAD, MEDIA, *controls]
        self._backend.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(controls)]
        )
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        self._specials = {token.content: id for id, token in added.items() if token.special}
        if names.eos is None and OWN_END in self._specials:
            names = replace(names, eos=OWN_END)
        if names.bos is None and OWN_START in self._specials:
            names = replace(names, bos=OWN_START)
        self.names = names
        self.pad_id = self._id_of(names.pad or names.eos, "pad", 0)
        self.media_id = self._id_of(names.media, "media", self.pad_id)
        self.bos_id = None if names.bos is None else self._id_of(names.bos, "bos", 0)
        self.eos_id = None if names.eos is None else self._id_of(names.eos, "eos", 0)

    def _id_of(self, name: str | None, role: str, default: int) -> int:
        if name is None:
            return default
        found = self._backend.token_to_id(name)
        if found is None:
            raise ConfigError(
                f"tokenizer: its {role} token is said to be {name!r}, which it does not hold; "
                f"its control tokens: {sorted(self._specials)}"
            )
        return int(found)

    @property
    def size(self) -> int:
        """Rows that an embedding needs for it: its largest id and one."""
        return self._size

    @cached_property
    def _size(self) -> int:
        # Published vocabularies may have holes: the number of tokens is not always the largest id and one.
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def controls(self) -> dict[str, int]:
        """Every control token and its id."""
        return dict(self._specials)

    def control(self, name: str) -> int:
        """The id of a control token, or of ``{end}``.

        Raises:
            ConfigError: if the tokenizer has no such token.
        """
        if name == END:
            if self.eos_id is None:
                raise ConfigError(
                    "tokenizer: no end token is known, and the chat format ends answers with it; "
                    "name it: tokenizer: {..., eos: NAME}"
                )
            return self.eos_id
        if name not in self._specials:
            raise ConfigError(unknown("control token", name, self._specials))
        return self._specials[name]

    def token_id(self, name: str) -> int | None:
        """The id of the token that the vocabulary writes like this, control or not; None without one."""
        found = self._backend.token_to_id(name)
        return None if found is None else int(found)

    def encode(self, text: str, *, is_first: bool = True) -> list[int]:
        """Ids of plain text; never holds a control token.

        Args:
            text: the text.
            is_first: False for text that continues a sequence, where some tokenizers begin no new word.
        """
        backend = self._backend if is_first else self._later
        return list(backend.encode(text, add_special_tokens=False).ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters ``[start, end)`` that each of :meth:`encode`'s ids stands for."""
        return [(int(start), int(end)) for start, end in self._backend.encode(text, add_special_tokens=False).offsets]

    @cached_property
    def _later(self) -> tokenizers.Tokenizer:
        """The backend for text that does not begin a sequence (Metaspace's ``prepend_scheme: first``)."""
        data = json.loads(self._backend.to_str())
        if not _never_prepend(data.get("pre_tokenizer")):
            return self._backend
        backend = tokenizers.Tokenizer.from_str(json.dumps(data))
        backend.encode_special_tokens = True
        return backend

    def split_controls(self, text: str) -> list[tuple[str, bool]]:
        """A text of our own making in pieces: ``(piece, whether it is the name of a control token)``."""
        pieces = self._control_names.split(text) if self._specials else [text]
        return [(piece, place % 2 == 1) for place, piece in enumerate(pieces) if piece]

    @cached_property
    def _control_names(self) -> re.Pattern[str]:
        longest_first = sorted(self._specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def prefix(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text (``<s>``, ``[CLS]``); often none."""
        return self._frame[0]

    @property
    def suffix(self) -> list[int]:
        """Ids that it puts behind a text (``[SEP]``); often none."""
        return self._frame[1]

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        framed = self._backend.encode("a", add_special_tokens=True)
        own = [place for place, is_special in enumerate(framed.special_tokens_mask) if not is_special]
        if not own:
            return list(framed.ids), []
        return list(framed.ids[: own[0]]), list(framed.ids[own[-1] + 1 :])

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

    def hub_files(self) -> dict[str, dict[str, Any]]:
        """``tokenizer.json`` and ``tokenizer_config.json`` as data, for any library that reads hub folders."""
        named = {
            f"{role}_token": name for role in ("pad", "bos", "eos") if (name := getattr(self.names, role)) is not None
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
        if self.names.media is not None:
            config["media_token"] = self.names.media
        return {"tokenizer.json": json.loads(self._backend.to_str()), "tokenizer_config.json": config}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        controls: Iterable[str] = (),
        names: TokenNames | None = None,
    ) -> Tokenizer:
        """Read a ``tokenizer.json``, or the tokenizer files of a checkpoint folder in whichever format they are.

        Args:
            path: the file or the folder.
            controls: control tokens to add where they are missing; nothing else is ever added to a published one.
            names: what it calls its control tokens; what is None is taken from ``tokenizer_config.json`` beside it.

        Raises:
            CheckpointError: if there is none, or the file is damaged.
        """
        backend = read_backend(Path(path))
        given, found = names or TokenNames(), read_names(Path(path), backend)
        merged = {role: getattr(given, role) or name for role, name in found.items()}
        return cls(backend, controls, TokenNames(**merged))


def _never_prepend(pre_tokenizer: Any) -> bool:
    """Change every ``first`` to ``never`` in a pre-tokenizer's data; whether there was one."""
    if not isinstance(pre_tokenizer, dict):
        return False
    if pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
        return True
    return any([_never_prepend(part) for part in pre_tokenizer.get("pretokenizers", ())])


class TokenStream:
    """Decodes ids one at a time, holding back bytes of unfinished characters.

    ``push`` returns the text that became certain; the pieces, joined, equal ``tokenizer.decode`` of all ids. Only the
    ids of the last piece are decoded again, for what a token becomes depends on whether one stands before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0
        """How many of the ids made the last piece."""

    def push(self, id: int) -> str:
        """Add one id and return the new text, possibly empty."""
        self._ids.append(id)
        piece = self._rest()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[self._before :]
        self._before = len(self._ids)
        return piece

    def finish(self) -> str:
        """What was held back, at the end."""
        piece = self._rest()
        self._before = len(self._ids)
        return piece

    def _rest(self) -> str:
        """The text of the ids after the last piece."""
        told = self._tokenizer.decode(self._ids[: self._before])
        return self._tokenizer.decode(self._ids)[len(told) :]
