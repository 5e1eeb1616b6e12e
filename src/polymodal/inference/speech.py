"""Transcripts by a decoder that looks at a recording and is told by control tokens what to write (Whisper).

Shape legend: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polymodal.core.batch import Example, ModelInput, Plan
from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.core.parts import Part
from polymodal.inference.engine import Engine
from polymodal.inference.sampling import Sampling
from polymodal.modalities.reader import checked_read
from polymodal.modalities.text import Tokenizer

START = "<|startoftranscript|>"
TASK = "<|transcribe|>"
NO_TIMES = "<|notimestamps|>"
FIRST_TIME = "<|0.00|>"
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_FIRST_TIME_AT_MOST = 50
"""A transcript begins within so many steps of 20 ms."""

Task = Literal["transcribe", "translate"]


@dataclass(frozen=True, slots=True)
class Speech:
    """What is wanted.

    Args:
        language: spoken in the recordings, as its code (``en``); None listens to the beginning of each.
        task: ``transcribe`` into that language, or ``translate`` into English.
        timestamps: whether the text says when each stretch begins and ends (``<|0.00|>``, in steps of 20 ms).
        max_new_tokens: longest transcript of a clip; the decoder's own limit may end it before.
    """

    language: str | None = None
    task: Task = "transcribe"
    timestamps: bool = False
    max_new_tokens: int = 448


def transcribe_speech(engine: Engine, parts: Sequence[Part], wanted: Speech, batch_size: int = 8) -> list[str]:
    """The greedy transcript of each recording.

    A recording longer than one clip of the reader (30 s) is transcribed clip by clip, each on its own; words across a
    border may suffer.

    Args:
        engine: of a model whose decoder looks at audio and whose tokenizer has Whisper's control tokens.
        parts: recordings.
        wanted: language and task.
        batch_size: clips at a time; the transcript of one does not depend on the others.

    Raises:
        ConfigError: if the model is none of those, or the language is unknown to it.
        MediaError: if a recording cannot be used.
    """
    stream, tokenizer = _audio_stream(engine), engine.processor.tokenizer
    reader = engine.processor.streams[stream].reader
    texts: list[list[str]] = []
    clips: list[tuple[int, Part, ModelInput]] = []
    for index, part in enumerate(parts):
        read = checked_read(reader, part, reader.measure(part))
        texts.append([])
        clips += [
            (index, part, ModelInput([unit], (length,))) for unit, length in zip(read.units, read.lengths, strict=True)
        ]
    rule = time_rule(tokenizer) if wanted.timestamps else None
    languages: dict[int, str | None] = {}
    for start in range(0, len(clips), batch_size):
        chosen = clips[start : start + batch_size]
        for index, part, clip in chosen:
            if index not in languages:
                languages[index] = wanted.language or _heard(engine, stream, part, clip)
        examples = [
            _example(stream, part, clip, prefix_ids(tokenizer, wanted, languages[index]))
            for index, part, clip in chosen
        ]
        answers = engine.generate_examples(examples, Sampling(max_new_tokens=wanted.max_new_tokens), rule)
        for (index, _, _), answer in zip(chosen, answers, strict=True):
            texts[index].append(tokenizer.decode(answer.ids).strip())
    return [" ".join(text for text in found if text) for found in texts]


def languages_of(tokenizer: Tokenizer) -> dict[str, int]:
    """The languages that a tokenizer has control tokens for, and their ids."""
    found = ((_LANGUAGE.fullmatch(name), id) for name, id in tokenizer.controls.items())
    return {match[1]: id for match, id in found if match is not None}


def prefix_ids(tokenizer: Tokenizer, wanted: Speech, language: str | None) -> list[int]:
    """What the decoder is told before it writes: language, task, and whether to write times.

    Worked example, ``language="de"``: ``<|startoftranscript|> <|de|> <|transcribe|> <|notimestamps|>``.

    Args:
        tokenizer: the model's.
        wanted: task and times.
        language: spoken; None for a model of one language, which is told neither language nor task.

    Raises:
        ConfigError: if the tokenizer has no token for the language.
    """
    ids = [tokenizer.control(START)]
    if language is not None:
        known = languages_of(tokenizer)
        if language not in known:
            raise ConfigError(unknown("language", language, known))
        ids += [known[language], tokenizer.control(f"<|{wanted.task}|>")]
    elif wanted.task == "translate":
        raise ConfigError("found task 'translate', expected 'transcribe': this model knows one language")
    return ids if wanted.timestamps else [*ids, tokenizer.control(NO_TIMES)]


def time_rule(tokenizer: Tokenizer) -> Callable[[Tensor, Sequence[Sequence[int]]], Tensor]:
    """The rule by which times are written: first, in pairs, never backwards, and where they are likelier than any word.

    Source: Whisper, arXiv 2212.04356, section 3.8 and its code.

    Raises:
        ConfigError: if the tokenizer has no times.
    """
    first, none, end = (tokenizer.token_id(name) for name in (FIRST_TIME, NO_TIMES, tokenizer.names.eos or ""))
    if first is None or none is None or end is None:
        raise ConfigError(f"timestamps: the tokenizer has no {FIRST_TIME}; ask for a transcript without")

    def rule(logits_BV: Tensor, written: Sequence[Sequence[int]]) -> Tensor:
        logits_BV = logits_BV.float().clone()
        logits_BV[:, none] = -torch.inf
        for row, ids in zip(logits_BV, written, strict=True):
            _forbid(row, ids, first, end)
        chances_BV = logits_BV.log_softmax(-1)
        is_time_B = chances_BV[:, first:].logsumexp(-1) > chances_BV[:, :first].amax(-1)
        logits_BV[:, :first] = logits_BV[:, :first].masked_fill(is_time_B[:, None], -torch.inf)
        return logits_BV

    return rule


def _forbid(logits_V: Tensor, ids: Sequence[int], first: int, end: int) -> None:
    """Take away what may not follow ``ids``."""
    if not ids:
        logits_V[:first] = -torch.inf
        logits_V[first + _FIRST_TIME_AT_MOST + 1 :] = -torch.inf
        return
    ends_in_time, before_is_time = ids[-1] >= first, len(ids) < 2 or ids[-2] >= first
    if ends_in_time and before_is_time:
        logits_V[first:] = -torch.inf
    elif ends_in_time:
        logits_V[:end] = -torch.inf
    times = [id for id in ids if id >= first]
    if times:
        # The end of one stretch may be the beginning of the next; any other time moves on.
        logits_V[first : times[-1] + (not (ends_in_time and not before_is_time))] = -torch.inf


def _audio_stream(engine: Engine) -> str:
    config = engine.model.config
    names = [name for name in config.watched_streams if config.streams[name].modality == "audio"]
    if len(names) != 1 or START not in engine.processor.tokenizer.controls:
        raise ConfigError(
            f"transcribe: found {len(names)} audio streams that the decoder looks at and "
            f"{'a' if START in engine.processor.tokenizer.controls else 'no'} control token {START}; expected a model "
            "such as Whisper; ask others with chat()"
        )
    return names[0]


def _example(stream: str, part: Part, clip: ModelInput, prefix: list[int]) -> Example:
    plan = Plan(getattr(part, "name", "recording"), prefix, [False] * len(prefix), [], {stream: [(part, clip.lengths)]})
    return Example(plan, {stream: [clip]})


def _heard(engine: Engine, stream: str, part: Part, clip: ModelInput) -> str | None:
    """The likeliest language of a clip; None where the model knows one alone."""
    tokenizer = engine.processor.tokenizer
    chat = engine.processor.chat
    if chat is None or TASK not in chat.controls:
        return None
    logits_V = engine.next_logits(_example(stream, part, clip, [tokenizer.control(START)]))
    return max(languages_of(tokenizer).items(), key=lambda pair: float(logits_V[pair[1]]))[0]
