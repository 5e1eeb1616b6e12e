"""SentencePiece models (``tokenizer.model``, ``spiece.model``) as ``tokenizers`` backends.

The file is a protocol buffer; the few fields that matter are read here, so that no further package is needed.

Source: Kudo 1808.06226 section 3; field numbers from ``sentencepiece_model.proto`` of its repository.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from polymodal.core.errors import CheckpointError

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a file says."""

    pieces: tuple[Piece, ...]
    kind: int
    has_byte_fallback: bool
    charsmap: bytes
    adds_dummy_prefix: bool
    removes_extra_spaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a model file.

    Raises:
        CheckpointError: if it is damaged, or of a kind other than unigram and BPE.
    """
    try:
        data = path.read_bytes()
        fields = list(_fields(data))
        pieces = tuple(_piece(value) for number, value in fields if number == 1)
        trainer = dict(_fields(next((value for number, value in fields if number == 2), b"")))
        normal = dict(_fields(next((value for number, value in fields if number == 3), b"")))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, struct.error, TypeError) as error:
        raise CheckpointError(f"{path}: is not a SentencePiece model: {error}") from None
    kind = trainer.get(3, _UNIGRAM)
    if not pieces or kind not in (_UNIGRAM, _BPE):
        raise CheckpointError(
            f"{path}: found {len(pieces)} pieces of the model type {kind}, expected a SentencePiece model of type "
            f"{_UNIGRAM} (unigram) or {_BPE} (BPE)"
        )
    return SentencePieceModel(
        pieces,
        kind,
        bool(trainer.get(35, 0)),
        bytes(normal.get(2, b"")),
        bool(normal.get(3, 1)),
        bool(normal.get(4, 1)),
    )


def _piece(data: bytes) -> Piece:
    found = dict(_fields(data))
    return Piece(bytes(found.get(1, b"")).decode("utf-8"), struct.unpack("<f", found[2])[0], found.get(3, 1))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer message: numbers as int, everything else as bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            length, place = _varint(data, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {place}")
        if place + length > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError(f"a number of more than 10 bytes at {place}")


def backend_of(model: SentencePieceModel, *, every_chunk: bool = False) -> tokenizers.Tokenizer:
    """The same tokenizer as a ``tokenizers`` backend.

    Args:
        model: what the file says.
        every_chunk: whether text after a control token begins with a space as well (``legacy`` in old configs).
    """
    unknown = next((place for place, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN), None)
    if model.kind == _BPE:
        backend = tokenizers.Tokenizer(
            models.BPE(
                {piece.text: place for place, piece in enumerate(model.pieces)},
                _merges(model.pieces),
                unk_token=None if unknown is None else model.pieces[unknown].text,
                fuse_unk=True,
                byte_fallback=model.has_byte_fallback,
            )
        )
    else:
        scores = [(piece.text, piece.score) for piece in model.pieces]
        backend = tokenizers.Tokenizer(models.Unigram(scores, unknown, model.has_byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.removes_extra_spaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    prefix = "never" if not model.adds_dummy_prefix else "always" if every_chunk else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prefix, split=model.kind == _UNIGRAM)
    strip = [decoders.Strip(" ", 1, 0)] if model.adds_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in model.pieces:
        if piece.kind in (_UNKNOWN, _CONTROL):
            backend.add_special_tokens([AddedToken(piece.text, special=True, normalized=False)])
        elif piece.kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(piece.text, special=False, normalized=False)])
    return backend


def _merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best-scored first: the order in which SentencePiece joins."""
    ids = {piece.text: place for place, piece in enumerate(pieces)}
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece in pieces:
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in ids and right in ids:
                found.append((-piece.score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
