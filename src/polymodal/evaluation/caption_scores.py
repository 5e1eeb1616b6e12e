"""Captions against references: the facts they name, and how near their words are (BLEU, CIDEr).

Facts are read by a pattern with named groups, one match per thing told of: of ``at the top a small red star`` a pattern
may read the groups ``place``, ``size``, ``colour`` and ``shape``. The first group says which thing it is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from polymodal.core.errors import DataError

SCORING = (
    "a thing counts as right if every fact of it is; one that is not there, said beyond those that are, counts as "
    "wrong; BLEU-4 over the corpus and CIDEr-D against one reference each"
)
"""What is counted, for reports."""

_ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0
Thing = Mapping[str, str]
Grams = Counter[tuple[str, ...]]


def read_things(text: str, pattern: re.Pattern[str]) -> list[Thing]:
    """The facts of each thing that a text tells of, in the text's order; groups that do not match are left out."""
    return [{k: v for k, v in m.groupdict().items() if v is not None} for m in pattern.finditer(text.lower())]


def right_facts(said: Sequence[Thing], true: Sequence[Thing], groups: Sequence[str]) -> list[dict[str, bool]]:
    """For each thing that is there, and for each that is said beyond their number, which facts are right.

    A true thing is paired with a said one that equals it, or else with one that agrees in the first group; every said
    thing is used once. A thing without a partner has no fact right, its first one neither.

    Worked example: said ``left red star``, ``top blue star`` where ``left red cross`` is: the first thing has place and
    colour right and the shape wrong; the second, said beyond what is there, has everything wrong.
    """
    left = list(said)
    partners: list[Thing | None] = [None] * len(true)
    for same in (groups, groups[:1]):
        for place, thing in enumerate(true):
            found = [other for other in left if all(other.get(g) == thing.get(g) for g in same)]
            if partners[place] is None and found:
                partners[place] = found[0]
                left.remove(found[0])
    rows = [
        {group: partner is not None and partner.get(group) == thing.get(group) for group in groups}
        for thing, partner in zip(true, partners, strict=True)
    ]
    return rows + [dict.fromkeys(groups, False) for _ in range(len(said) - len(true))]


def fact_pattern(text: str) -> re.Pattern[str]:
    """The pattern, with named groups.

    Raises:
        ValueError: if it is no regular expression or names no group.
    """
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from None
    if not pattern.groupindex:
        raise ValueError(f"{text!r} names no group, expected some, such as (?P<colour>red|blue)")
    return pattern


def bleu(said: Sequence[str], true: Sequence[str]) -> float:
    """BLEU-4 of a corpus with one reference each, 0..1; 0 if some order has no match.

    Source: Papineni et al. 2002, section 2.3.
    """
    hits, counts = Counter[int](), Counter[int]()
    for mine, reference in zip(said, true, strict=True):
        for order in _ORDERS:
            grams, wanted = _grams(mine, order), _grams(reference, order)
            hits[order] += sum((grams & wanted).values())
            counts[order] += sum(grams.values())
    if not all(hits[order] for order in _ORDERS):
        return 0.0
    mean = sum(math.log(hits[order] / counts[order]) for order in _ORDERS) / len(_ORDERS)
    lengths = [sum(len(_words(text)) for text in texts) for texts in (said, true)]
    return math.exp(mean + min(0.0, 1 - lengths[1] / lengths[0]))


def cider(said: Sequence[str], true: Sequence[str]) -> float:
    """CIDEr-D of a corpus with one reference each, 0..10; rarity of words is that in the references.

    Source: Vedantam et al., arXiv 1411.5726, sections 3 and 6 (clipping, length penalty with sigma 6, times 10).
    """
    total = 0.0
    for order in _ORDERS:
        wanted = [_grams(text, order) for text in true]
        holding = Counter(gram for grams in wanted for gram in grams)
        rarity = {gram: math.log(len(true) / count) for gram, count in holding.items()}
        rarest = math.log(len(true))
        for text, mine, reference in zip(said, (_grams(text, order) for text in said), wanted, strict=True):
            weights = [{g: n * rarity.get(g, rarest) for g, n in grams.items()} for grams in (mine, reference)]
            norms = [math.sqrt(sum(w * w for w in vector.values())) for vector in weights]
            if not all(norms):
                continue
            dot = sum(min(weights[0].get(gram, 0.0), weight) * weight for gram, weight in weights[1].items())
            apart = len(_words(text)) - sum(reference.values()) - order + 1
            total += dot / (norms[0] * norms[1]) * math.exp(-(apart**2) / (2 * _SIGMA**2))
    return 10 * total / (len(true) * len(_ORDERS))


def count_right(said: Sequence[str], true: Sequence[str], pattern: re.Pattern[str]) -> dict[str, list[bool]]:
    """Over all things of all captions: per group of the pattern, and as ``overall``, whether it is right.

    Raises:
        DataError: if no reference tells of a thing.
    """
    groups = list(pattern.groupindex)
    things = [
        (read_things(mine, pattern), read_things(reference, pattern))
        for mine, reference in zip(said, true, strict=True)
    ]
    if not any(there for _, there in things):
        raise DataError(f"facts: the pattern {pattern.pattern!r} matches no reference, such as {true[0]!r}")
    rows = [row for mine, there in things for row in right_facts(mine, there, groups)]
    found: dict[str, Any] = {group: [row[group] for row in rows] for group in groups}
    return {"overall": [all(row.values()) for row in rows], **found}


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def _grams(text: str, order: int) -> Grams:
    words = _words(text)
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
