"""Chat formats: how messages become one sequence, and which of its spans are targets.

A format is data. The spans that it supervises come from its own structure (what the assistant said, and the mark
that ends its turn), never from searching the rendered text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polymodal.core.config import Config, unknown
from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.parts import Media, Text
from polymodal.core.samples import Message


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of a rendered conversation: ``text``, the name of a ``control`` token, or a ``media`` part."""

    text: str = ""
    control: str = ""
    media: Media | None = None
    is_supervised: bool = False


class Turn(Config):
    """What stands before and after the content of one role; entries in ``<|...|>`` or ``<...>`` are control tokens."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


class ChatFormat(Config):
    """A chat format.

    Worked example, the format ``turns`` with one question and answer (supervised runs in brackets)::

        <|user|> What is it? <|assistant|> [A cat. <|end|>]
    """

    name: str
    controls: tuple[str, ...]
    """The control tokens it uses; the tokenizer gets them."""
    start: tuple[str, ...] = ()
    system: Turn
    user: Turn
    assistant: Turn
    end: str
    """The control token that ends the assistant's turn: generation stops at it; it is supervised."""

    def render(self, messages: Sequence[Message], *, id: str, prompt: bool = False) -> list[Segment]:
        """The segments of a conversation.

        Args:
            messages: the turns.
            id: the sample's id, for errors.
            prompt: end with the opening of an assistant turn, for generation.

        Raises:
            SampleError: if media stand in an assistant turn, or (with ``prompt``) the last turn is the assistant's.
        """
        segments = [self._fixed(item) for item in self.start]
        for message in messages:
            turn: Turn = getattr(self, message.role)
            is_answer = message.role == "assistant"
            segments += [self._fixed(item) for item in turn.before]
            for part in message.parts:
                if isinstance(part, Text):
                    segments.append(Segment(text=part.text, is_supervised=is_answer))
                elif isinstance(part, Media):
                    if is_answer:
                        raise SampleError(id, f"{part.modality} in an assistant turn; only text can be an answer here")
                    segments.append(Segment(media=part))
            for item in turn.after:
                segments.append(self._fixed(item, is_supervised=is_answer and item == self.end))
        if prompt:
            if messages and messages[-1].role == "assistant":
                raise SampleError(id, "the last message is the assistant's; expected a user message to answer")
            segments += [self._fixed(item) for item in self.assistant.before]
        return segments

    def _fixed(self, item: str, is_supervised: bool = False) -> Segment:
        if item in self.controls:
            return Segment(control=item, is_supervised=is_supervised)
        return Segment(text=item, is_supervised=is_supervised)


def _turns() -> ChatFormat:
    end = "<|end|>"
    return ChatFormat(
        name="turns",
        controls=("<|system|>", "<|user|>", "<|assistant|>", end),
        system=Turn(before=("<|system|>",)),
        user=Turn(before=("<|user|>",)),
        assistant=Turn(before=("<|assistant|>",), after=(end,)),
        end=end,
    )


def _chatml() -> ChatFormat:
    start, end = "<|im_start|>", "<|im_end|>"
    return ChatFormat(
        name="chatml",
        controls=(start, end),
        system=Turn(before=(start, "system\n"), after=(end, "\n")),
        user=Turn(before=(start, "user\n"), after=(end, "\n")),
        assistant=Turn(before=(start, "assistant\n"), after=(end, "\n")),
        end=end,
    )


def _vicuna() -> ChatFormat:
    return ChatFormat(
        name="vicuna",
        controls=("<s>", "</s>"),
        start=("<s>",),
        system=Turn(after=(" ",)),
        user=Turn(before=("USER: ",), after=(" ",)),
        assistant=Turn(before=("ASSISTANT: ",), after=("</s>",)),
        end="</s>",
    )


CHAT_FORMATS = {build().name: build() for build in (_turns, _chatml, _vicuna)}
"""The known formats by name. ``turns`` has one control token per role and is the choice for models from scratch."""


def chat_format(name: str) -> ChatFormat:
    """The format called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    if name not in CHAT_FORMATS:
        raise ConfigError(unknown("chat format", name, CHAT_FORMATS))
    return CHAT_FORMATS[name]
