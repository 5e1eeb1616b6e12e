"""Chat formats: how messages become one sequence, and which of its spans are targets.

A format is data. The spans that it supervises come from its own structure (what the assistant said, and the mark
that ends its turn), never from searching the rendered text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from polymodal.core.config import Config
from polymodal.core.errors import SampleError
from polymodal.core.parts import Media, Text
from polymodal.core.samples import Message
from polymodal.modalities.text.tokenizer import END, START, Tokenizer


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of a rendered conversation: ``text``, the name of a ``control`` token, or a ``media`` part.

    ``is_fixed``: the text is the format's and not a person's, so that control tokens in it are meant.
    """

    text: str = ""
    control: str = ""
    media: Media | None = None
    is_supervised: bool = False
    is_fixed: bool = False


class Chat(Protocol):
    """What lays conversations out: a :class:`ChatFormat`, or a checkpoint's own template."""

    @property
    def controls(self) -> tuple[str, ...]:
        """The control tokens that the tokenizer must have."""

    @property
    def end(self) -> str:
        """The control token that ends the assistant's turn."""

    def render(self, messages: Sequence[Message], *, id: str, prompt: bool = False) -> list[Segment]:
        """The segments of a conversation."""


class Turn(Config):
    """What stands before and after the content of one role; names in the format's ``controls`` are control tokens."""

    before: tuple[str, ...] = ()
    gap: str = ""
    """Between the opening and the content. It is the assistant's to write: a prompt ends before it."""
    after: tuple[str, ...] = ()


class ChatFormat(Config):
    """A chat format.

    Worked example, the format ``turns`` with one question and answer (supervised runs in brackets)::

        <|user|> What is it? <|assistant|> [A cat. <|end|>]
    """

    name: str
    controls: tuple[str, ...]
    """The control tokens it uses; a tokenizer that is trained here gets them."""
    start: tuple[str, ...] = ()
    """What begins every conversation; ``{start}`` is whatever the tokenizer itself puts before a text."""
    system: Turn
    user: Turn
    assistant: Turn
    user_after_system: Turn | None = None
    """The first user turn where a system turn stands before it; None: as any other."""
    media: Turn = Turn()
    """What stands around each media item."""
    media_first: bool = False
    """Whether all media stand before everything else, what begins the conversation included (BLIP-2)."""
    default_system: str = ""
    """The system turn of conversations that bring none; "" for none."""
    end: str
    """The control token that ends the assistant's turn: generation stops at it; it is supervised. ``{end}`` is the
    tokenizer's own end token."""

    def render(self, messages: Sequence[Message], *, id: str, prompt: bool = False) -> list[Segment]:
        """The segments of a conversation.

        Args:
            messages: the turns.
            id: the sample's id, for errors.
            prompt: end with the opening of an assistant turn, for generation.

        Raises:
            SampleError: if media stand in an assistant turn, or (with ``prompt``) the last turn is the assistant's.
        """
        if self.default_system and (not messages or messages[0].role != "system"):
            messages = [Message("system", (Text(self.default_system),)), *messages]
        segments = self._media(messages, id) if self.media_first else []
        segments += [self._fixed(item) for item in self.start]
        previous = ""
        for message in messages:
            turn: Turn = getattr(self, message.role)
            if message.role == "user" and previous == "system":
                turn = self.user_after_system or turn
            previous = message.role
            segments += self._turn(turn, message, id)
        if prompt:
            require_question(messages, id)
            segments += [self._fixed(item) for item in self.assistant.before]
        return segments

    def _media(self, messages: Sequence[Message], id: str) -> list[Segment]:
        found = []
        for message in messages:
            for part in message.parts:
                if isinstance(part, Media):
                    require_no_answer(part, message.role == "assistant", id)
                    found.append(Segment(media=part))
        return found

    def _turn(self, turn: Turn, message: Message, id: str) -> Iterator[Segment]:
        is_answer = message.role == "assistant"
        yield from (self._fixed(item) for item in turn.before)
        if turn.gap:
            yield Segment(text=turn.gap, is_supervised=is_answer, is_fixed=True)
        for part in message.parts:
            if isinstance(part, Text):
                yield Segment(text=part.text, is_supervised=is_answer)
            elif isinstance(part, Media) and not self.media_first:
                require_no_answer(part, is_answer, id)
                yield from (self._fixed(item) for item in self.media.before)
                yield Segment(media=part)
                yield from (self._fixed(item) for item in self.media.after)
        ends = is_answer and self.end in turn.after
        for item in turn.after:
            # What stands before the end token is the assistant's to write as well; what follows it is not.
            yield self._fixed(item, is_supervised=ends)
            ends = ends and item != self.end

    def _fixed(self, item: str, is_supervised: bool = False) -> Segment:
        if item in self.controls or item in (START, END):
            return Segment(control=item, is_supervised=is_supervised)
        return Segment(text=item, is_supervised=is_supervised, is_fixed=True)


def require_question(messages: Sequence[Message], id: str) -> None:
    """Prove that there is something to answer.

    Raises:
        SampleError: if the last turn is the assistant's.
    """
    if messages and messages[-1].role == "assistant":
        raise SampleError(id, "the last message is the assistant's; expected a user message to answer")


def require_no_answer(part: Media, is_answer: bool, id: str) -> None:
    """Prove that a media part does not stand in an answer.

    Raises:
        SampleError: if it does.
    """
    if is_answer:
        raise SampleError(id, f"{part.modality} in an assistant turn; only text can be an answer here")


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive token ids with one target flag, or one media part."""

    ids: tuple[int, ...] = ()
    media: Media | None = None
    is_supervised: bool = False


def tokenize(segments: Iterable[Segment], tokenizer: Tokenizer) -> Iterator[Run]:
    """Token ids of segments.

    Texts that touch are encoded as one, so that the ids are those of the rendered text and not of its pieces; a change
    from prompt to target stays a border, because generation begins there.
    """
    text, is_target, is_first = "", False, True
    for segment in chain.from_iterable(_with_controls(one, tokenizer) for one in segments):
        touches = not segment.control and segment.media is None and segment.is_supervised == is_target
        if text and not touches:
            yield Run(tuple(tokenizer.encode(text, is_first=is_first)), None, is_target)
            text, is_first = "", False
        is_target = segment.is_supervised
        if segment.media is not None:
            yield Run(media=segment.media)
        elif segment.control == START:
            yield Run(tuple(tokenizer.prefix), None, is_target)
        elif segment.control:
            yield Run((tokenizer.control(segment.control),), None, is_target)
        else:
            text += segment.text
            continue
        is_first = segment.control == START
    if text:
        yield Run(tuple(tokenizer.encode(text, is_first=is_first)), None, is_target)


def _with_controls(segment: Segment, tokenizer: Tokenizer) -> Iterator[Segment]:
    """A segment with the control tokens that a format's own text spells as segments of their own."""
    if not segment.is_fixed:
        yield segment
        return
    for piece, is_control in tokenizer.split_controls(segment.text):
        if is_control:
            yield Segment(control=piece, is_supervised=segment.is_supervised)
        else:
            yield Segment(text=piece, is_supervised=segment.is_supervised)
