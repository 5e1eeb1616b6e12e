"""How a recipe names modules and parameters: an exact dotted path, or a glob over dotted paths.

Worked example over the names ``streams.image.connector.0.weight`` and ``streams.audio.connector.0.weight``:
``streams.image`` and ``streams.image.connector`` select the first, ``streams.*.connector`` both, ``image`` neither,
``streams.im`` neither.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from polymodal.core.errors import ConfigError


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the dotted path ``name`` or a whole-component prefix of it; ``* ? []`` are globs.

    A ``*`` may span dots.
    """
    if not any(mark in pattern for mark in "*?["):
        return name == pattern or name.startswith(pattern + ".")
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def match_names(pattern: str, names: Iterable[str], kind: str, where: str) -> list[str]:
    """The names that ``pattern`` selects, in their order.

    Args:
        pattern: a dotted path or a glob.
        names: the dotted names to choose from.
        kind: what the names are, for the message (``"parameter or module"``).
        where: where the pattern stands in the recipe, for the message.

    Raises:
        ConfigError: if nothing matches; names the nearest paths.
    """
    names = list(names)
    found = [name for name in names if matches(pattern, name)]
    if not found:
        near = nearest(pattern, names)
        hint = f"nearest: {', '.join(near)}" if near else "there is none to choose from"
        raise ConfigError(
            f"{where}: no {kind} matches {pattern!r}; {hint}. Expected a whole dotted path, or a pattern with *"
        )
    return found


def nearest(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names, or dotted prefixes of names, most like ``pattern`` as a whole or in their last part."""
    paths: dict[str, None] = {}
    for name in names:
        steps = name.split(".")
        paths.update(dict.fromkeys(".".join(steps[:end]) for end in range(1, len(steps) + 1)))
    last = pattern.strip("*.").rpartition(".")[2]

    def likeness(path: str) -> float:
        return max(_ratio(pattern, path), 0.9 * _ratio(last, path.rpartition(".")[2]))

    return sorted(paths, key=likeness, reverse=True)[:count]


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()
