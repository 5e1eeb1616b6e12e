"""Words that state facts, found in texts: to be hidden, or to be changed into another of their group."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Groups = Mapping[str, Sequence[str]]
"""Group of facts -> its words or phrases, of which exactly one is true of a thing."""

ENGLISH: Groups = {
    "colour": (
        "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray",
    ),
    "number": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "size": ("small", "little", "large", "big", "tiny", "huge"),
    "place": ("left", "right", "top", "bottom", "above", "below", "over", "under"),
}  # fmt: skip
"""Facts that captions of many corpora state."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One word of a group in a text: ``text[start:end]``, spelled as there; ``word`` is how the group spells it."""

    group: str
    word: str
    start: int
    end: int


def find_facts(text: str, groups: Groups) -> list[Fact]:
    """The words of the groups that stand exactly once in a text, in its order.

    A word that stands there again is left out: whoever hides or changes one of the two is given away by the other. Of
    two phrases that begin alike the longer one is meant.

    Worked example, groups ``{"colour": ["red", "blue"], "place": ["at the top", "at the top left"]}``: in "at the top
    left a red star and a blue star, at the top a blue cross" stand "at the top left", "red" and "at the top".
    """
    found = [fact for name, words in groups.items() for fact in _occurrences(text, name, words)]
    counts: dict[tuple[str, str], int] = {}
    for fact in found:
        counts[fact.group, fact.word] = counts.get((fact.group, fact.word), 0) + 1
    single = [fact for fact in found if counts[fact.group, fact.word] == 1]
    return sorted(single, key=lambda fact: (fact.start, fact.group))


def _occurrences(text: str, group: str, words: Sequence[str]) -> Iterator[Fact]:
    by_spelling = {word.lower(): word for word in words}
    longest_first = sorted(by_spelling, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    for match in re.finditer(pattern, text, re.IGNORECASE):
        yield Fact(group, by_spelling[match[0].lower()], *match.span())


def change_fact(text: str, fact: Fact, words: Sequence[str], rng: np.random.Generator) -> str | None:
    """The text with one fact changed into another of its group, drawn among those that the text does not hold.

    Args:
        text: that the fact was found in.
        fact: the one to change.
        words: all of its group.
        rng: draws.

    Returns:
        The text with nothing else changed; None where it holds every word of the group.
    """
    present = {found.word for found in _occurrences(text, fact.group, words)}
    others = [word for word in words if word not in present]
    if not others:
        return None
    new = others[int(rng.integers(len(others)))]
    if text[fact.start].isupper():
        new = new[:1].upper() + new[1:]
    return text[: fact.start] + new + text[fact.end :]
