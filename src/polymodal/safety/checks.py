"""Checks on the text that comes in and goes out: is it what a person can see, and is it only text?

They find text that was made to be read differently by a person and by a model. They are not a content filter.
Control strings are harmless to the model itself, because the tokenizer never turns text into control tokens; they are
reported because somebody tried.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from polymodal.core.config import Config
from polymodal.core.parts import Text
from polymodal.core.samples import Sample

Action = Literal["allow", "review", "block"]
_SEVERITY: tuple[Action, ...] = ("allow", "review", "block")


class Policy(Config):
    """What is looked for, and what follows when it is found; ``allow`` switches a check off."""

    control_strings: tuple[str, ...] = ("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<image>", "<audio>", "<video>")
    """Strings of chat formats beside the ``<|name|>`` shape, which is always looked for; compared without case."""
    on_control_string: Action = "review"
    """A control string of a chat format inside text."""
    on_invisible: Action = "review"
    """Characters that do not show: zero-width, tag and control characters, stray joiners and direction marks."""
    on_bidi: Action = "review"
    """Characters that reorder what is shown (embeddings, overrides, isolates)."""
    on_long: Action = "block"
    """Text above ``max_chars``."""
    max_chars: int = Field(default=100_000, ge=1)
    """Characters of all text parts of a sample together, or of one answer."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One finding: which check, what it found and where, and what the policy says about it."""

    check: str
    message: str
    action: Action


@dataclass(frozen=True, slots=True)
class Verdict:
    """The strictest action of all findings, and the findings."""

    action: Action
    reasons: tuple[Reason, ...] = ()

    @property
    def message(self) -> str:
        """The findings in one line; empty if there are none."""
        return "; ".join(reason.message for reason in self.reasons)


def check_input(sample: Sample, policy: Policy | None = None) -> Verdict:
    """Check every text that a person wrote: user and system messages, and text views."""
    policy = policy or Policy()
    texts = [
        (f"messages[{i}] ({message.role})", part.text)
        for i, message in enumerate(sample.messages)
        if message.role != "assistant"
        for part in message.parts
        if isinstance(part, Text)
    ]
    texts += [(f"views.{name}", part.text) for name, part in sample.views.items() if isinstance(part, Text)]
    return _verdict(texts, policy)


def check_output(text: str, policy: Policy | None = None) -> Verdict:
    """Check one answer before it is shown."""
    return _verdict([("answer", text)], policy or Policy())


def _verdict(texts: list[tuple[str, str]], policy: Policy) -> Verdict:
    reasons: list[Reason] = []
    total = sum(len(text) for _, text in texts)
    if total > policy.max_chars:
        message = f"text: {total:,} characters, the limit (max_chars) is {policy.max_chars:,}; shorten it"
        reasons.append(Reason("long", message, policy.on_long))
    checks: list[tuple[str, Action, Callable[[str], Iterator[str]]]] = [
        ("control_string", policy.on_control_string, lambda text: _control_strings(text, policy.control_strings)),
        ("invisible", policy.on_invisible, _invisible),
        ("bidi", policy.on_bidi, _bidi),
    ]
    for place, text in texts:
        for check, action, find in checks:
            found = sorted(set(find(text)))
            if found:
                shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
                reasons.append(Reason(check, f"{place}: {_MEANINGS[check]}: {shown}", action))
    reasons = [reason for reason in reasons if reason.action != "allow"]
    worst = max((_SEVERITY.index(reason.action) for reason in reasons), default=0)
    return Verdict(_SEVERITY[worst], tuple(reasons))


_MEANINGS = {
    "control_string": "contains control strings of a chat format, which count as plain text",
    "invisible": "contains characters that do not show",
    "bidi": "contains characters that change the order in which text is shown",
}

_CONTROL_SHAPE = re.compile(r"<\|[^|<>\s]{1,40}\|>")
_BIDI = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
_JOINERS = "\u200c\u200d"
_DIRECTION_MARKS = "\u200e\u200f\u061c"
# Default-ignorable characters that are not of category Cf: fillers, and variation selectors beyond the emoji ones.
_FILLERS = frozenset(map(chr, (0x115F, 0x1160, 0x3164, 0xFFA0, 0x034F, *range(0xE0100, 0xE01F0))))


def _control_strings(text: str, strings: tuple[str, ...]) -> Iterator[str]:
    yield from _CONTROL_SHAPE.findall(text)
    lower = text.lower()
    yield from (string for string in strings if string.lower() in lower)


def _bidi(text: str) -> Iterator[str]:
    yield from (f"U+{ord(char):04X}" for char in text if char in _BIDI)


def _invisible(text: str) -> Iterator[str]:
    if text.isascii() and text.isprintable():
        return
    letters = (char for char in text if char not in _DIRECTION_MARKS)
    is_right_to_left = any(unicodedata.bidirectional(char) in ("R", "AL") for char in letters)
    for i, char in enumerate(text):
        category = unicodedata.category(char)
        if char in _JOINERS:
            # Emoji sequences, Persian and the scripts of India use joiners between letters; Latin text never does.
            before, after = text[i - 1 : i], text[i + 1 : i + 2]
            hidden = not (before and after) or before.isascii() or after.isascii()
        elif char in _DIRECTION_MARKS:
            hidden = not is_right_to_left
        elif char == "\ufeff":
            hidden = i > 0
        elif category == "Cf":
            hidden = char not in _BIDI
        else:
            hidden = char in _FILLERS or (category == "Cc" and char not in "\t\n\r")
        if hidden:
            yield f"U+{ord(char):04X}"
