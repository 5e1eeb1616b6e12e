"""A checkpoint's own chat template (Jinja) as a chat format whose targets are derived exactly.

A template is a program from messages to text; it does not say what the assistant wrote. That is found without guessing:

- Every content is replaced by a mark before rendering, so that a person's words are never read as the template's, and
  their place is known exactly. A second rendering with the words themselves must give the same text.
- A media item of a kind that the template does not know stands as such a mark in the text, where it was said.
- An answer's target begins where the prompt for it ends: the messages before it, rendered as a prompt, must be a prefix
  of the whole conversation. It ends with the first end token behind the answer's words.

Where one of these does not hold, the sample is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from pydantic import Field

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError, MissingExtraError, SampleError
from polymodal.core.parts import Media, Text
from polymodal.core.samples import Message
from polymodal.modalities.text.chat import Segment, require_no_answer, require_question
from polymodal.modalities.text.tokenizer import START

_MARK = re.compile("\ue000(\\d+)\ue001")


class ChatTemplate(Config):
    """A chat format given by a Jinja template, as checkpoints bring it."""

    template: str
    """The Jinja source."""
    end: str
    """The control token that ends an answer."""
    tokens: dict[str, str] = Field(default_factory=dict)
    """What the template calls tokens: ``bos_token``, ``eos_token``, ... -> their names."""
    options: dict[str, bool | str] = Field(default_factory=dict)
    """Further variables of the template (``enable_thinking``)."""
    start: bool = False
    """Whether the tokenizer's own start token comes first where the template does not write it (processors that
    tokenise what the template gives)."""
    marks: dict[str, str] = Field(default_factory=dict)
    """Per modality, the placeholder that the template writes for one media item (``image: <image>``). With marks,
    contents are given to the template as lists of typed parts. Items of other modalities stand in the text as they are
    said, and the template need not know them."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return "the checkpoint's template"

    @property
    def controls(self) -> tuple[str, ...]:
        """The control tokens that the tokenizer must have."""
        return (self.end,)

    def render(self, messages: Sequence[Message], *, id: str, prompt: bool = False) -> list[Segment]:
        """The segments of a conversation; arguments as :meth:`ChatFormat.render`.

        Raises:
            SampleError: if the template refuses the conversation, changes what was said, or its answers cannot be
                told from the rest exactly.
            ConfigError: if it is not a template.
            MissingExtraError: if Jinja is not installed.
        """
        if prompt:
            require_question(messages, id)
        contents = _numbered(messages, id)
        data = [self._message(messages, contents, place, marked=True) for place in range(len(messages))]
        whole = self._fill(data, prompt, id)
        texts = self._prove_contents(messages, contents, whole, prompt, id)
        targets = [
            self._target(data, place, contents, whole, id)
            for place, message in enumerate(messages)
            if message.role == "assistant"
        ]
        media = [part for parts in contents for _, part in parts if isinstance(part, Media)]
        places = [*self._places(whole, media, id), *self._inline(whole, contents, id)]
        segments = _cut(whole, texts, targets, sorted(places, key=lambda place: place[0]))
        has_start = "bos_token" in self.tokens and whole.startswith(self.tokens["bos_token"])
        return [Segment(control=START), *segments] if self.start and not has_start else segments

    def _message(
        self, messages: Sequence[Message], contents: Sequence[_Content], place: int, *, marked: bool
    ) -> dict[str, Any]:
        parts: list[dict[str, str]] = []
        for number, part in contents[place]:
            if isinstance(part, Media) and part.modality in self.marks:
                parts.append({"type": part.modality})
            else:
                is_said = isinstance(part, Text) and not marked
                parts.append({"type": "text", "text": part.text if is_said else _mark(number)})  # type: ignore[union-attr]
        role = messages[place].role
        if self.marks:
            return {"role": role, "content": parts}
        return {"role": role, "content": "".join(part.get("text", "") for part in parts)}

    def _fill(self, data: Sequence[Mapping[str, Any]], prompt: bool, id: str) -> str:
        compiled = _compile(self.template)
        try:
            return str(
                compiled.render(
                    messages=list(data), add_generation_prompt=prompt, tools=None, documents=None,
                    **{**self.tokens, **self.options},
                )
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001  (a template may fail in any way)
            raise SampleError(id, f"the chat template refuses it: {error}") from None

    def _prove_contents(
        self, messages: Sequence[Message], contents: Sequence[_Content], whole: str, prompt: bool, id: str
    ) -> dict[int, str]:
        """The texts as the template writes them: unchanged, or without space around each message."""
        real = [self._message(messages, contents, place, marked=False) for place in range(len(messages))]
        expected = self._fill(real, prompt, id)
        said = {
            number: part.text if isinstance(part, Text) else _mark(number)
            for parts in contents
            for number, part in parts
            if isinstance(part, Text) or part.modality not in self.marks
        }
        trimmed = {}
        for parts in contents:
            own = [number for number, _ in parts if number in said]
            for number in own:
                text = said[number]
                text = text.lstrip() if number == own[0] else text
                trimmed[number] = text.rstrip() if number == own[-1] else text
        for texts in (said, trimmed):
            if _MARK.sub(lambda mark, texts=texts: texts[int(mark[1])], whole) == expected:  # type: ignore[misc]
                return texts
        raise SampleError(
            id,
            "the chat template does not write the messages as they are (it drops, repeats or rewrites one); "
            "choose a chat format by name, for example chat: chatml",
        )

    def _target(
        self, data: Sequence[Mapping[str, Any]], place: int, contents: Sequence[_Content], whole: str, id: str
    ) -> tuple[int, int]:
        """From where to where the assistant wrote the rendered text."""
        opening = self._fill(data[:place], True, id)
        if not whole.startswith(opening):
            raise SampleError(
                id,
                f"the chat template's prompt for message {place} is not how it writes the conversation up to there, "
                "so that training would differ from answering; choose a chat format by name, for example chat: chatml",
            )
        marks = [_mark(number) for number, _ in contents[place]]
        last = whole.find(marks[-1], len(opening)) if marks else len(opening)
        stop = whole.find(self.end, last)
        following = _MARK.search(whole, last + len(marks[-1]) if marks else last)
        if last < 0 or stop < 0 or (following is not None and following.start() < stop):
            raise SampleError(
                id,
                f"the chat template does not end message {place} with {self.end!r}; "
                "name the token that does: chat: {template: ..., end: TOKEN}",
            )
        return len(opening), stop + len(self.end)

    def _places(self, whole: str, media: Sequence[Media], id: str) -> list[tuple[int, int, Media]]:
        """From where to where the placeholder of each media item stands that the template knows."""
        found = []
        for modality, mark in self.marks.items():
            items = [part for part in media if part.modality == modality]
            spans = [match.span() for match in re.finditer(re.escape(mark), whole)] if items else []
            if len(spans) != len(items):
                raise SampleError(
                    id,
                    f"the chat template writes {len(spans)} placeholder(s) {mark!r} for {len(items)} {modality} "
                    f"item(s); name what it writes: chat: {{template: ..., marks: {{{modality}: TOKEN}}}}",
                )
            found += [(*span, part) for span, part in zip(spans, items, strict=True)]
        return found

    def _inline(self, whole: str, contents: Sequence[_Content], id: str) -> list[tuple[int, int, Media]]:
        """From where to where the marks of the other media items stand."""
        found = []
        for number, part in (entry for parts in contents for entry in parts):
            if isinstance(part, Text) or part.modality in self.marks:
                continue
            if whole.count(_mark(number)) != 1:
                raise SampleError(
                    id,
                    f"the chat template writes an item of {part.modality} {whole.count(_mark(number))} times, expected "
                    "once; choose a chat format by name, for example chat: chatml",
                )
            start = whole.index(_mark(number))
            found.append((start, start + len(_mark(number)), part))
        return found


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


_Content = list[tuple[int, Text | Media]]
"""The parts of a message, numbered through the conversation."""


def _numbered(messages: Sequence[Message], id: str) -> list[_Content]:
    contents: list[_Content] = []
    number = 0
    for message in messages:
        parts = [part for part in message.parts if isinstance(part, Text | Media)]
        for part in parts:
            if isinstance(part, Media):
                require_no_answer(part, message.role == "assistant", id)
        contents.append(list(enumerate(parts, start=number)))
        number += len(parts)
    return contents


def _cut(
    whole: str, texts: Mapping[int, str], targets: Sequence[tuple[int, int]], media: Sequence[tuple[int, int, Media]]
) -> list[Segment]:
    """The rendered text in segments: fixed text, contents and media, cut where targets begin and end."""
    pieces: list[tuple[int, int, Segment]] = [
        (mark.start(), mark.end(), Segment(text=texts[int(mark[1])]))
        for mark in _MARK.finditer(whole)
        if mark.start() not in {start for start, _, _ in media}
    ]
    pieces += [(start, stop, Segment(media=part)) for start, stop, part in media]
    segments: list[Segment] = []
    borders = sorted({border for target in targets for border in target})

    def is_target(place: int) -> bool:
        return any(start <= place < stop for start, stop in targets)

    def add_fixed(start: int, stop: int) -> None:
        cuts = [start, *(border for border in borders if start < border < stop), stop]
        for left, right in pairwise(cuts):
            if right > left:
                segments.append(Segment(text=whole[left:right], is_supervised=is_target(left), is_fixed=True))

    place = 0
    for start, stop, segment in sorted(pieces, key=lambda piece: piece[0]):
        add_fixed(place, start)
        supervised = segment.media is None and is_target(start)
        segments.append(Segment(text=segment.text, media=segment.media, is_supervised=supervised))
        place = stop
    add_fixed(place, len(whole))
    return segments


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("jinja2", "hub", "a checkpoint's chat template") from None

    class Generation(Extension):
        """``{% generation %} ... {% endgeneration %}``: marks answers for other libraries; only its body counts."""

        tags = {"generation"}  # noqa: RUF012  (the library's own interface)

        def parse(self, parser: Any) -> Any:
            """The body alone."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.If(nodes.Const(True), body, [], []).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise ConfigError(f"chat: the template is not valid Jinja: {error}") from None
