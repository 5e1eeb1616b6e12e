"""The prefix cache: keys and values of prompts already read, found again by content.

A media item asked about again is neither encoded nor prefilled again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

from polymodal.core.batch import Plan, Span
from polymodal.core.parts import Text
from polymodal.models.layers.cache import KVCache

Identity = tuple[Hashable, ...]


def identity(plan: Plan, watched: Collection[str] = ()) -> Identity:
    """What each token of a plan is: a text id, or ``(stream, content key, offset)`` of a media token.

    Two prompts whose identities share a prefix have equal keys and values there.

    Args:
        plan: the plan.
        watched: streams that the decoder looks at from any token: what their items are is part of the first one. So are
            the words that connectors read beside the media.
    """
    tokens: list[Hashable] = list(plan.ids)
    keys: dict[int, str] = {}
    for span in plan.spans:
        part, _ = plan.items[span.stream][span.item]
        if id(part) not in keys:
            keys[id(part)] = part.content_key()
        for offset in range(span.length):
            tokens[span.start + offset] = (span.stream, keys[id(part)], offset)
    seen: list[Hashable] = [(stream, part.text) for stream, part in _words(plan)]
    seen += [(stream, part.content_key()) for stream in watched for part, _ in plan.items.get(stream, ())]
    if seen:
        tokens[0] = (tokens[0], *seen)
    return tuple(tokens)


def _words(plan: Plan) -> list[tuple[str, Text]]:
    """Texts that stand beside the sequence."""
    return [(name, part) for name, items in plan.items.items() for part, _ in items if isinstance(part, Text)]


def suffix(plan: Plan, start: int) -> Plan:
    """The plan of the tokens from ``start`` on, with the media they need; ``start`` must not lie inside a span.

    Items that stand nowhere in the sequence, which the decoder looks at, belong to what was read before ``start``.
    """
    if start == 0:
        return plan
    spans: list[Span] = []
    items: dict[str, list[tuple[Any, tuple[int, ...]]]] = {}
    for span in plan.spans:
        if span.start >= start:
            kept = items.setdefault(span.stream, [])
            spans.append(replace(span, start=span.start - start, item=len(kept)))
            kept.append(plan.items[span.stream][span.item])
    items.update({name: plan.items[name] for name, _ in _words(plan)})
    return replace(plan, ids=plan.ids[start:], is_supervised=plan.is_supervised[start:], spans=spans, items=items)


def media_end(plan: Plan) -> int:
    """How many tokens stand before the end of the last medium of the sequence; 0 without media."""
    return max((span.start + span.length for span in plan.spans), default=0)


def until_media(plan: Plan) -> Plan:
    """The plan of the tokens up to the end of the last medium."""
    end = media_end(plan)
    return replace(plan, ids=plan.ids[:end], is_supervised=plan.is_supervised[:end])


def same_media(plans: Sequence[Plan]) -> list[int]:
    """For each plan the first one that is the same up to the end of the last medium; itself where none is, or no media.

    Worked example, prompts ``ab?``, ``x``, ``ab!!``, ``ac?`` about the media ``b`` and ``c``: ``[0 1 0 3]``.
    """
    first: dict[Identity, int] = {}
    found = []
    for place, plan in enumerate(plans):
        end = media_end(plan)
        found.append(first.setdefault(identity(plan)[:end], place) if end else place)
    return found


def usable_start(plan: Plan, shared: int) -> int:
    """How many of the ``shared`` leading tokens serve: never all of them, and never a part of a media span."""
    shared = min(shared, plan.num_tokens - 1)
    for span in plan.spans:
        if span.start < shared < span.start + span.length:
            shared = span.start
    return shared


class _Place:
    """What some entries begin with: a node of the tree of tokens.

    Args:
        entry: the one that was used last.
    """

    __slots__ = ("entry", "followed", "num")

    def __init__(self, entry: Identity) -> None:
        self.entry = entry
        self.followed: dict[Hashable, _Place] = {}
        self.num = 0


class PrefixCache:
    """The most recently used prompts, bounded in bytes; searched in a tree, one step for each token of the prompt.

    Args:
        max_bytes: bytes of keys and values kept in all; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[Identity, KVCache] = OrderedDict()
        self._root = _Place(())
        self.hits = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, plan: Plan, own: Identity) -> tuple[int, KVCache | None]:
        """The longest shared prefix: its length and the cache that holds it (not a copy).

        Of equally long ones the last used is taken, so that the few tokens that every prompt begins with do not keep
        an old entry alive.
        """
        places = [self._root]
        for token in own:
            place = places[-1].followed.get(token)
            if place is None:
                break
            places.append(place)
        best = usable_start(plan, len(places) - 1)
        if best < 1:
            return 0, None
        self.hits += 1
        found = places[best].entry
        self._touch(found, 0)
        return best, self._entries[found]

    def put(self, own: Sequence[Hashable], cache: KVCache) -> None:
        """Keep a copy of a one-row cache that holds exactly the tokens ``own``."""
        if self.max_bytes == 0:
            return
        entry = tuple(own)
        if entry in self._entries:
            self._remove(entry)
        self._entries[entry] = cache.clone(max_tokens=max(1, cache.length))
        self.num_bytes += self._entries[entry].num_bytes
        self._touch(entry, 1)
        while self._entries and self.num_bytes > self.max_bytes:
            self._remove(next(iter(self._entries)))

    def _touch(self, entry: Identity, new: int) -> None:
        """Make an entry the last used one, at every place on its way."""
        self._entries.move_to_end(entry)
        place = self._root
        for token in entry:
            place = place.followed.setdefault(token, _Place(entry))
            place.entry = entry
            place.num += new

    def _remove(self, entry: Identity) -> None:
        """Forget an entry, the one used longest ago or one that is put anew at once: no other place names it then."""
        self.num_bytes -= self._entries.pop(entry).num_bytes
        place = self._root
        for token in entry:
            following = place.followed[token]
            following.num -= 1
            if not following.num:
                del place.followed[token]
                return
            place = following
