"""ask, chat and embed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.apps.output import emit_json, emit_table, say
from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError, PolymodalError, SampleError
from polymodal.core.parts import MODALITIES, MODALITY_OF_EXTENSION, Part, Text, media_part, part_from_path
from polymodal.core.samples import Message
from polymodal.inference.sampling import Sampling
from polymodal.recipes.model import Model
from polymodal.recipes.stored_models import load


def parse_part(text: str) -> Part:
    """A command-line argument as a part: ``modality:source``, an existing file, or text.

    Raises:
        MediaError: if it names a file that is of no known modality.
        ConfigError: if it looks like a file that is not there.
    """
    head, colon, rest = text.partition(":")
    if colon and head in MODALITIES:
        form = "modality:path, as in points:cloud.npy"
        return Text(rest) if head == "text" else media_part(head, _existing(rest, text, form))
    if "\n" not in text and len(text) < 1024 and Path(text).is_file():
        return part_from_path(text)
    if text.startswith(("http://", "https://")) and " " not in text:
        raise ConfigError(f"{text}: nothing is fetched from the net; download it and name the file")
    if "/" in text and os.path.isdir(text):
        raise ConfigError(f"{text}: is a folder, expected a file; write text:{text} if it is meant as text")
    suffix = Path(text).suffix.lower()
    looks_like_file = suffix in MODALITY_OF_EXTENSION or (suffix[1:].isalnum() and " " not in text)
    if looks_like_file:
        raise ConfigError(f"{text}: no such file; write text:{text} if it is meant as text")
    return Text(text)


def _existing(path: str, argument: str, form: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise ConfigError(f"{argument}: no such file: {path or '(nothing)'}; expected {form}")
    return found


def ask(
    model: Path, inputs: list[str], options: dict[str, Any], device: str | None, tokens: int | None, *, as_json: bool
) -> None:
    """Answer one question, streaming to a terminal."""
    parts = [parse_part(item) for item in inputs]
    texts = [part.text for part in parts if isinstance(part, Text)]
    if not any(text.strip() for text in texts):
        found = "an empty question" if texts else "only files, expected a question after them"
        raise ConfigError(f'found {found}: polymodal ask MODEL photo.png "What is it?"')
    sampling = Sampling.parse(options)
    loaded = load(model, device)
    if as_json:
        answer = loaded.chat(*parts, sampling=sampling, tokens=tokens)
        emit_json(
            {
                "text": answer.text,
                "finish": answer.finish,
                "tokens": len(answer.tokens),
                "prompt_tokens": answer.prompt_tokens,
                "reused_tokens": answer.reused_tokens,
                "seconds": round(answer.seconds, 4),
                "choices": list(answer.choices),
            }
        )
        return
    _print_pieces(loaded.stream(*parts, sampling=sampling, tokens=tokens))


def _print_pieces(pieces: Iterator[str]) -> str:
    """Write the pieces as they come; Ctrl-C ends the answer and keeps what was said."""
    said = []
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(said)


_HELP = """/image PATH, /audio PATH, /video PATH, /points PATH, /sensor PATH  add media to the next message
/reset  forget the conversation     /quit  leave     /help  this text     Ctrl-C  stop an answer"""
_COMMANDS = tuple(f"/{name}" for name in (*MODALITIES[1:], "reset", "quit", "help"))


def chat(model: Path, options: dict[str, Any], device: str | None, tokens: int | None = None) -> None:
    """A conversation in the terminal; keeps its history until /reset."""
    sampling = Sampling.parse(options)
    loaded = load(model, device)
    if sys.stdin.isatty():
        # Gives input() its line editing and history.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    if loaded.engine.processor.chat is None:
        raise ConfigError(f"{model}: this model has no decoder: it embeds and compares, it does not answer")
    talk = Conversation(loaded, sampling, tokens)
    say(f"{loaded.recipe.name}: takes {', '.join(talk.takes)}. /help lists the commands.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        if line in ("/quit", "/exit"):
            return
        try:
            talk.take(line)
        except PolymodalError as error:
            say(f"error: {error}")


class Conversation:
    """What a chat remembers: the turns so far, and the media that wait for the next message.

    Args:
        model: who answers.
        sampling: how answers are drawn.
        tokens: the most tokens of all media of the conversation; None: as the recipe says.
    """

    def __init__(self, model: Model, sampling: Sampling, tokens: int | None = None) -> None:
        self._model = model
        self._sampling = sampling
        self._tokens = tokens
        self.history: list[Message] = []
        self.pending: list[Part] = []
        streams = model.recipe.model.streams.values()
        enters = {stream.modality for stream in streams if stream.enters.use != "none"}
        self.takes = [name for name in MODALITIES if name == "text" or name in enters]

    def take(self, line: str) -> None:
        """Do what one typed line says: a command, or a message.

        Raises:
            PolymodalError: if it cannot be done; the conversation stays as it was, without the media that waited.
        """
        if line.startswith("/"):
            word, _, argument = line[1:].partition(" ")
            self._command(word, argument.strip().strip("'\""))
        elif line or self.pending:
            self._message(line)

    def _command(self, word: str, argument: str) -> None:
        if word == "help":
            say(_HELP)
        elif word == "reset":
            self.history.clear()
            self.pending.clear()
        elif word in self.takes[1:]:
            self.pending.append(media_part(word, _existing(argument, f"/{word}", f"/{word} PATH")))
        elif word in MODALITIES[1:]:
            raise ConfigError(f"/{word}: this model takes {', '.join(self.takes)}")
        else:
            raise ConfigError(unknown("command", f"/{word}", _COMMANDS))

    def _message(self, line: str) -> None:
        parts: tuple[Part, ...] = (*self.pending, Text(line)) if line else tuple(self.pending)
        self.pending.clear()
        try:
            pieces = self._model.stream(*parts, history=self.history, sampling=self._sampling, tokens=self._tokens)
            said = _print_pieces(pieces)
        except SampleError as error:
            hint = "; /reset forgets the conversation so far" if self.history else ""
            raise ConfigError(f"{error.problem}{hint}") from None
        self.history += [Message("user", parts), Message("assistant", (Text(said),))]


def embed(model: Path, inputs: list[str], out: Path | None, device: str | None, *, as_json: bool) -> None:
    """Embed parts; prints similarities, or writes the vectors."""
    vectors = load(model, device).embed([parse_part(item) for item in inputs])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("wb") as file:
            np.save(file, vectors)
    if as_json:
        emit_json(
            {"inputs": inputs, "dim": vectors.shape[-1], "out": out, "vectors": None if out else vectors.tolist()}
        )
        return
    # Of items with several vectors, the best two count.
    several = vectors.reshape(len(vectors), -1, vectors.shape[-1])
    similarity = np.einsum("ime,jne->ijmn", several, several).max((2, 3))
    rows = [[item, *(f"{value:.3f}" for value in similarity[row])] for row, item in enumerate(inputs)]
    emit_table("cosine similarity", ["", *(str(i + 1) for i in range(len(inputs)))], rows)
    if out is not None:
        say(f"wrote float32 {list(vectors.shape)} to {out}")
