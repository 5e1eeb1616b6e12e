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


def common_start(plan: Plan, own: Identity, other: Identity) -> int:
    """How many leading tokens of a plan another prompt shares; never ends inside a media span or at the last token."""
    shared = 0
    for mine, theirs in zip(own, other, strict=False):
        if mine != theirs:
            break
        shared += 1
    shared = min(shared, len(own) - 1)
    for span in plan.spans:
        if span.start < shared < span.start + span.length:
            shared = span.start
    return shared


class PrefixCache:
    """The most recently used prompts, bounded in bytes.

    Args:
        max_bytes: bytes of keys and values kept in all; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Identity, KVCache] = OrderedDict()
        self.hits = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values kept."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def find(self, plan: Plan, own: Identity) -> tuple[int, KVCache | None]:
        """The longest shared prefix: its length and the cache that holds it (not a copy).

        Of equally long ones the last used is taken, so that the few tokens that every prompt begins with do not keep
        an old entry alive.
        """
        best, found = 0, None
        for other in reversed(self._entries):
            shared = common_start(plan, own, other)
            if shared > best:
                best, found = shared, other
        if found is None:
            return 0, None
        self.hits += 1
        self._entries.move_to_end(found)
        return best, self._entries[found]

    def put(self, own: Sequence[Hashable], cache: KVCache) -> None:
        """Keep a copy of a one-row cache that holds exactly the tokens ``own``."""
        if self.max_bytes == 0:
            return
        self._entries[tuple(own)] = cache.clone(max_tokens=max(1, cache.length))
        self._entries.move_to_end(tuple(own))
        while self._entries and self.num_bytes > self.max_bytes:
            self._entries.popitem(last=False)
