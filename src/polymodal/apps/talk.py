"""ask, chat and embed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.apps.output import console, emit_json, emit_table
from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError, PolymodalError
from polymodal.core.parts import MODALITIES, Part, Text, media_part, part_from_path
from polymodal.core.samples import Message
from polymodal.inference.sampling import Sampling
from polymodal.recipes.model import Model, load


def parse_part(text: str) -> Part:
    """A command-line argument as a part: ``modality:source``, an existing file, or text.

    Raises:
        MediaError: if it names a file that is of no known modality.
        ConfigError: if it looks like a file that is not there.
    """
    head, colon, rest = text.partition(":")
    if colon and head in MODALITIES:
        return Text(rest) if head == "text" else media_part(head, rest)
    if Path(text).is_file():
        return part_from_path(text)
    if Path(text).suffix and " " not in text and not text.endswith((".", "?", "!")):
        raise ConfigError(f"{text}: no such file; write text:{text} if it is meant as text")
    return Text(text)


def ask(model: Path, inputs: list[str], options: dict[str, Any], device: str | None, *, as_json: bool) -> None:
    """Answer one question, streaming to a terminal."""
    parts = [parse_part(item) for item in inputs]
    if not any(isinstance(part, Text) for part in parts):
        raise ConfigError('found only files, expected a question after them: polymodal ask MODEL photo.png "What is it?"')
    loaded = load(model, device)
    sampling = Sampling.parse(options)
    if as_json:
        answer = loaded.chat(*parts, sampling=sampling)
        emit_json(
            {
                "text": answer.text,
                "finish": answer.finish,
                "tokens": len(answer.tokens),
                "prompt_tokens": answer.prompt_tokens,
                "seconds": round(answer.seconds, 4),
            }
        )
        return
    _print_pieces(loaded.stream(*parts, sampling=sampling))


def _print_pieces(pieces: Any) -> str:
    said = []
    for piece in pieces:
        said.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(said)


_HELP = """/image PATH, /audio PATH, /video PATH, /points PATH, /sensor PATH  add media to the next message
/reset  forget the conversation     /quit  leave     /help  this text"""


def chat(model: Path, options: dict[str, Any], device: str | None) -> None:
    """A conversation in the terminal; keeps its history until /reset."""
    loaded = load(model, device)
    sampling = Sampling.parse(options)
    screen = console()
    screen.print(f"{loaded.recipe.name}: takes {', '.join(_modalities(loaded))}. /help lists the commands.")
    history: list[Message] = []
    pending: list[Part] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line.startswith("/"):
            word, _, argument = line[1:].partition(" ")
            if word in ("quit", "exit"):
                return
            try:
                _chat_command(word, argument.strip(), history, pending)
            except PolymodalError as error:
                screen.print(f"error: {error}")
        elif line or pending:
            _say(loaded, line, history, pending, sampling)


def _chat_command(word: str, argument: str, history: list[Message], pending: list[Part]) -> None:
    if word == "help":
        console().print(_HELP)
    elif word == "reset":
        history.clear()
        pending.clear()
    elif word in MODALITIES[1:]:
        if not Path(argument).is_file():
            raise ConfigError(f"{argument or '(nothing)'}: no such file; write /{word} PATH")
        pending.append(media_part(word, argument))
    else:
        raise ConfigError(unknown("command", f"/{word}", [f"/{name}" for name in (*MODALITIES[1:], "reset", "quit", "help")]))


def _say(model: Model, line: str, history: list[Message], pending: list[Part], sampling: Sampling) -> None:
    parts: tuple[Part, ...] = (*pending, Text(line)) if line else tuple(pending)
    pending.clear()
    try:
        said = _print_pieces(model.stream(*parts, history=history, sampling=sampling))
    except PolymodalError as error:
        console().print(f"error: {error}")
        return
    history += [Message("user", parts), Message("assistant", (Text(said),))]


def _modalities(model: Model) -> list[str]:
    streams = model.recipe.model.streams.values()
    return ["text", *sorted({stream.modality for stream in streams if stream.enters.use == "sequence"})]


def embed(model: Path, inputs: list[str], out: Path | None, device: str | None, *, as_json: bool) -> None:
    """Embed parts; prints similarities, or writes the vectors."""
    vectors = load(model, device).embed([parse_part(item) for item in inputs])
    if out is not None:
        with out.open("wb") as file:
            np.save(file, vectors)
    if as_json:
        emit_json({"inputs": inputs, "dim": vectors.shape[1], "out": out, "vectors": None if out else vectors.tolist()})
        return
    similarity = vectors @ vectors.T
    rows = [[item, *(f"{value:.3f}" for value in similarity[row])] for row, item in enumerate(inputs)]
    emit_table("cosine similarity", ["", *(str(i + 1) for i in range(len(inputs)))], rows)
    if out is not None:
        console().print(f"wrote float32 {list(vectors.shape)} to {out}")
