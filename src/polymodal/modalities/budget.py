"""A budget of media tokens per sample: fewer tiles, fewer frames, pooled tokens, chosen from headers alone.

The rule: every item gets an equal share, and what small items leave goes to the others. Within its share an item takes
the choice that loses least along its worse axis (units: tiles or frames; detail: neighbouring tokens pooled).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from polymodal.core.errors import SampleError
from polymodal.core.parts import Part
from polymodal.modalities.image import ImageReader
from polymodal.modalities.reader import Reader
from polymodal.modalities.video import VideoReader

Count = Callable[[tuple[int, ...]], int]
"""Unit lengths of an item -> its tokens before pooling."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How one item is read.

    Args:
        part: the item.
        reader: what reads it.
        lengths: of its units.
        tokens: before pooling.
        pool: so many neighbouring tokens become their mean.
        lost: the larger of the two factors by which units and detail became fewer; 1 for all of it.
    """

    part: Part
    reader: Reader
    lengths: tuple[int, ...]
    tokens: int
    pool: int = 1
    lost: float = 1.0

    @property
    def count(self) -> int:
        """Tokens that it takes in the sequence."""
        return -(-self.tokens // self.pool)

    @property
    def modality(self) -> str:
        """That of the part."""
        return self.part.modality

    @property
    def name(self) -> str:
        """What messages call the item."""
        return str(getattr(self.part, "name", self.part.modality))

    def content_key(self) -> str:
        """As the part's own, and how it is read: other frames are other content."""
        part: Any = self.part
        return f"{part.content_key()}:{self.lengths}:{self.pool}"


@dataclass(frozen=True, slots=True)
class Want:
    """One item as it would be without a budget.

    Args:
        stream: that reads it.
        part: the item.
        reader: of the stream.
        count: tokens of unit lengths.
    """

    stream: str
    part: Part
    reader: Reader
    count: Count

    def whole(self) -> Choice:
        """All of it."""
        lengths = self.reader.measure(self.part)
        return Choice(self.part, self.reader, lengths, self.count(lengths))


def fit_budget(
    wants: Sequence[Want], total: int | None, per_stream: dict[str, int], sample: str
) -> tuple[list[Choice], list[str]]:
    """How each item is read so that no budget is passed.

    Worked example: images of 576, 576 and 64 tokens, budget 512: shares 224, 224 and 64; pooled by 3, 192 tokens each.

    Args:
        wants: the items of a sample, in order.
        total: most tokens of all of them; None: any number.
        per_stream: most tokens of a stream's items.
        sample: its id, for messages.

    Returns:
        One choice per item, and what was chosen for those that are not whole, in words.

    Raises:
        SampleError: if even the least of every item is too much.
        MediaError: as the readers' ``measure`` does.
    """
    whole = [want.whole() for want in wants]
    caps = [choice.count for choice in whole]
    for stream, budget in per_stream.items():
        rows = [row for row, want in enumerate(wants) if want.stream == stream]
        for row, share in zip(
            rows, _shares([caps[row] for row in rows], budget, f"stream {stream!r}", sample), strict=True
        ):
            caps[row] = share
    if total is not None:
        caps = _shares(caps, total, "all media", sample)
    chosen = [_within(want, full, cap) for want, full, cap in zip(wants, whole, caps, strict=True)]
    if total is not None:
        # What one item's steps leave over may let another keep more.
        for row, want in enumerate(wants):
            spare = total - sum(choice.count for choice in chosen)
            if want.stream not in per_stream and chosen[row].lost > 1 and spare > 0:
                chosen[row] = _within(want, whole[row], chosen[row].count + spare)
    words = [_words(want, full, choice) for want, full, choice in zip(wants, whole, chosen, strict=True)]
    return chosen, [word for word in words if word]


def _shares(wanted: Sequence[int], budget: int, what: str, sample: str) -> list[int]:
    """Equal shares of a budget; what small items do not need goes to the others; every item keeps one token."""
    if len(wanted) > budget:
        raise SampleError(
            sample,
            f"tokens: found a budget of {budget} for {len(wanted)} media items ({what}), expected at least "
            f"{len(wanted)}: one token each; raise the budget or send fewer",
        )
    shares, left = [0] * len(wanted), budget
    order = sorted(range(len(wanted)), key=lambda row: wanted[row])
    for place, row in enumerate(order):
        shares[row] = min(wanted[row], left // (len(order) - place))
        left -= shares[row]
    return shares


def _within(want: Want, whole: Choice, cap: int) -> Choice:
    """The best choice of an item with at most ``cap`` tokens."""
    if whole.count <= cap:
        return whole
    best: Choice | None = None
    for reader, lengths in _fewer_units(want.reader, want.part, whole.lengths):
        tokens = want.count(lengths)
        pool = max(1, math.ceil(tokens / cap))
        lost = max(sum(whole.lengths) / sum(lengths), pool)
        choice = Choice(want.part, reader, lengths, tokens, pool, lost)
        if best is None or (choice.lost, -choice.count) < (best.lost, -best.count):
            best = choice
    assert best is not None
    return best


def _fewer_units(reader: Reader, part: Part, lengths: tuple[int, ...]) -> Iterator[tuple[Reader, tuple[int, ...]]]:
    """Readers of fewer and fewer tiles or frames, with the unit lengths that they give; the reader itself first."""
    yield reader, lengths
    if isinstance(reader, VideoReader):
        for frames in range(lengths[0] - 1, 0, -1):
            less = {"num_frames": frames} if reader.config.sampling != "fps" else {"max_frames": frames}
            yield _changed(reader, less), (frames,)
    elif isinstance(reader, ImageReader) and reader.config.resolution != "fixed":
        seen = {len(lengths)}
        for changes in _smaller_grids(reader):
            smaller = _changed(reader, changes)
            found = smaller.measure(part)
            if len(found) not in seen and len(found) < len(lengths):
                seen.add(len(found))
                yield smaller, found


def _smaller_grids(reader: ImageReader) -> Iterator[dict[str, Any]]:
    """Changes of a reader's config that give fewer tiles: coarser grids, or fewer tiles of the same."""
    config = reader.config
    if config.tiles_by == "content":
        yield from ({"keep_tiles": tiles} for tiles in range((config.keep_tiles or config.max_tiles) - 1, 0, -1))
    elif config.resolution == "tiles":
        yield from ({"max_tiles": tiles} for tiles in range(config.max_tiles - 1, 0, -1))
    elif config.resolution == "anyres":
        areas = sorted({rows * cols for rows, cols in config.grids}, reverse=True)
        for area in areas[1:]:
            yield {"grids": tuple(grid for grid in config.grids if grid[0] * grid[1] <= area)}
        yield {"resolution": "fixed"}


def _changed(reader: Any, changes: dict[str, Any]) -> Reader:
    changed: Reader = type(reader)(reader.config.model_copy(update=changes), reader.limits)
    return changed


def _words(want: Want, whole: Choice, choice: Choice) -> str:
    """What was chosen; "" for all of it."""
    if choice.lost <= 1:
        return ""
    units = ""
    if choice.lengths != whole.lengths:
        what = "frames" if choice.modality == "video" else "tiles"
        units = f"{sum(choice.lengths)} of {sum(whole.lengths)} {what}, "
    pooled = f"every {choice.pool} tokens pooled, " if choice.pool > 1 else ""
    return f"{choice.name} ({want.stream}): {units}{pooled}{choice.count} of {whole.count} tokens"
