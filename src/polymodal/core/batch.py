"""What flows from readers to models: model inputs, laid-out examples, batches, and a model's outputs.

Arrays are numpy where the processor makes them and torch tensors once ``models.compose.to_device`` has moved them;
this module imports neither.

Shape legend: ``I`` items (one media part for one stream), ``U`` units (what an encoder takes at once: an image tile,
a clip, a window), ``L`` length along a unit's ragged axis, ``R`` rows, ``T`` tokens of a row, ``S`` samples,
``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from polymodal.core.passes import TokenPass

Array = Any
"""A numpy array or a torch tensor; the shape stands in the attribute's docstring."""


class TileLengths(tuple[int, ...]):
    """Lengths of the units of a picture that is cut into tiles, with where the tiles lie.

    Args:
        lengths: a 1 for every tile; one more than the grid has where the whole picture comes first.
        grid: rows and columns of the tiles.
        size_px: (width, height) of the picture before it was scaled.
    """

    grid: tuple[int, int]
    size_px: tuple[int, int]

    def __new__(
        cls, lengths: Iterable[int], grid: tuple[int, int] = (1, 1), size_px: tuple[int, int] = (1, 1)
    ) -> TileLengths:
        """The lengths as a tuple that also says where the tiles lie."""
        made = super().__new__(cls, lengths)
        made.grid, made.size_px = grid, size_px
        return made


@dataclass(slots=True)
class ModelInput:
    """One media item, ready for an encoder.

    Args:
        units: float32 arrays (int64 for text), one per unit. Ragged modalities have the length first: log-mel
            ``[L, mels]``, frames ``[L, 3, H, W]``, points ``[L, C]``, sensor ``[L, C]``, ids ``[L]``.
            Images are ``[3, H, W]`` and have length 1.
        lengths: the length of each unit; equal to what the reader promised from the header.
        grid: rows and columns of the tiles after the thumbnail, for tiled images.
        size_px: original (width, height) of an image.
    """

    units: list[Array]
    lengths: tuple[int, ...]
    grid: tuple[int, int] | None = None
    size_px: tuple[int, int] | None = None


@dataclass(slots=True)
class Span:
    """Where one media item stands in a laid-out sequence.

    ``item`` counts the items of ``stream`` within the sample; tokens ``start .. start + length`` are its placeholders.
    """

    stream: str
    item: int
    start: int
    length: int
    tokens: int = 0
    """What the item gives before pooling."""
    pool: int = 1
    """So many neighbouring tokens of the item become their mean, to keep a budget."""


@dataclass(slots=True)
class Plan:
    """One sample laid out from headers alone: everything but the decoded media.

    Args:
        id: the sample's id.
        ids: token ids with placeholders, a list of ``T`` ints; empty for a view set.
        is_supervised: which tokens are targets (assistant spans and their end mark); same length as ``ids``.
        spans: the media spans in order.
        items: per stream, ``(part, unit lengths)`` of each item, in order.
        label: the class, if any.
        modalities: the modalities that are there, text apart; sorted.
        num_source: how many of the first tokens an encoder-decoder's encoder reads; 0 for all other models.
    """

    id: str
    ids: list[int]
    is_supervised: list[bool]
    spans: list[Span]
    items: dict[str, list[tuple[Any, tuple[int, ...]]]]
    label: str | None = None
    modalities: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    num_source: int = 0
    choices: list[str] = field(default_factory=list)
    """What was lessened to keep a budget of tokens, in words."""
    rows: dict[str, Array] = field(default_factory=dict)
    """Per stream of fixed unit shape, the rows of the batch's values that its units may be read into."""

    @property
    def num_tokens(self) -> int:
        """Length of the laid-out sequence."""
        return len(self.ids)


@dataclass(slots=True)
class Example:
    """A plan with its media decoded (or, per item, ``None`` where cached features stand in)."""

    plan: Plan
    inputs: dict[str, list[ModelInput | None]]
    keys: dict[str, list[str]] = field(default_factory=dict)
    """Per stream, the content key of each item; empty unless a feature cache asked for them."""


@dataclass(slots=True)
class StreamBatch:
    """All items of one stream in a batch.

    Args:
        values: ``[U, ...]`` model inputs, padded with zeros along the ragged axis; None if every item is cached.
        lengths: ``[U]`` int64 valid length of each unit.
        unit_counts: list of ``I`` ints: units of each item; units stand in item order.
        sample_of_item: ``[I]`` int64: which sample an item belongs to.
        token_index: ``[sum of span lengths]`` int64: for each media token in item order, its place in the flattened
            ``[R * T]`` sequence; empty for streams that do not enter the sequence.
        token_counts: list of ``I`` ints: length of each item's span.
        keys: content key of each item, where a feature cache is used.
        grids: per item, the tile grid or None.
        features: cached encoder output ``(features [U, N, D], is_valid [U, N], pooled [U, D])``; replaces values.
    """

    values: Array
    lengths: Array
    unit_counts: list[int]
    sample_of_item: Array
    token_index: Array
    token_counts: list[int]
    pools: list[tuple[int, int]] = field(default_factory=list)
    """Per item, its tokens before pooling and how many neighbours become one; empty where nothing is pooled."""
    keys: list[str] = field(default_factory=list)
    grids: list[tuple[int, int] | None] = field(default_factory=list)
    items: list[tuple[int, ...]] = field(default_factory=list)
    """Per item, the lengths of its units (:class:`TileLengths` of tiled pictures)."""
    features: tuple[Array, Array, Array] | None = None


@dataclass(slots=True)
class Batch:
    """Samples ready for a model.

    A *padded* batch has one row per sample. A *packed* batch has one row in which samples follow each other:
    ``segment_lengths`` says where each ends, positions restart at 0, and nothing may attend across a boundary.

    Worked example, two samples of 3 and 2 tokens, packed: ids ``[[a b c d e]]``, positions ``[[0 1 2 0 1]]``,
    segment_lengths ``(3, 2)``. Padded: ids ``[[a b c] [d e 0]]``, is_valid ``[[1 1 1] [1 1 0]]``.

    Args:
        ids: ``[R, T]`` int64 token ids; media placeholders hold the stream's placeholder id.
        is_supervised: ``[R, T]`` bool: the token is a target, predicted from the one before it. The first token of a
            sample never is.
        is_valid: ``[R, T]`` bool: False on padding.
        positions: ``[R, T]`` int64, counted within each sample.
        segment_lengths: tokens of each packed sample, in order; None for a padded batch.
        streams: per stream, its items.
        sample_ids: list of ``S`` ids; labels, modalities: parallel to it.
        source_lengths: for an encoder-decoder, how many tokens at the beginning of each sample its encoder reads.
    """

    ids: Array
    is_supervised: Array
    is_valid: Array
    positions: Array
    segment_lengths: tuple[int, ...] | None
    streams: dict[str, StreamBatch]
    sample_ids: list[str]
    labels: list[str | None]
    modalities: list[tuple[str, ...]]
    source_lengths: tuple[int, ...] | None = None

    @property
    def num_samples(self) -> int:
        """How many samples the batch holds."""
        return len(self.sample_ids)


def group_numbers(keys: Iterable[Hashable | None]) -> list[int]:
    """A number for each key, equal exactly for equal keys; None equals no other, not even None.

    Worked example: ``cat None dog cat None`` give ``0 1 2 0 4``.
    """
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault((place, None) if key is None else (-1, key), place) for place, key in enumerate(keys)]


@dataclass(slots=True)
class CtcOutput:
    """What a head for connectionist temporal classification says of a batch, and its own alphabet.

    Args:
        logits: ``[I, N, V]``: of each item its features in order, scores of tokens and of the blank.
        lengths: ``[I]`` int64 valid features of each item.
        sample_of_item: ``[I]`` int64.
        blank: id of the blank.
        encode: transcript -> token ids.
    """

    logits: Array
    lengths: Array
    sample_of_item: Array
    blank: int
    encode: Callable[[str], list[int]]


@dataclass(slots=True)
class Teacher:
    """What a momentum twin says of a batch, and what it said of earlier ones.

    Args:
        embeddings: as :attr:`Outputs.embeddings`, of the twin; without a graph.
        tokens: as :attr:`Outputs.tokens`, with the same places hidden.
        queues: per stream, the twin's unit vectors ``[Q, E]`` of earlier samples, ``Q`` so far.
        groups: per stream, int64 ``[Q]``: a number for the label of each, equal for equal labels.
    """

    embeddings: dict[str, tuple[Array, Array]]
    queues: dict[str, Array]
    groups: dict[str, Array]
    tokens: dict[TokenPass, TokenOutput] = field(default_factory=dict)


@dataclass(slots=True)
class TokenOutput:
    """What a masked_token head predicts, and what stood there; all None where the batch holds nothing to predict.

    Args:
        predictions: ``[K, V]`` logits, or normalised pixels.
        targets: ``[K]`` int64 ids or codes, or the pixels ``[K, V]``.
        samples: ``[K]`` int64, the sample of each place.
        shown: per stream with hidden places, the encoder's input and which places are hidden.
    """

    predictions: Array = None
    targets: Array = None
    samples: Array = None
    shown: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outputs:
    """What one forward pass of a composed model gives; a field is None when its pass was not asked for.

    Args:
        token_logits: ``[K, V]`` logits that predict the K supervised tokens, in flattened order (pass ``sequence``).
        token_targets: ``[K]`` int64 their ids; token_samples ``[K]`` int64 the sample each belongs to.
        embeddings: per stream, ``(vectors [I, E] of unit length, sample_of_item [I])`` (pass ``embed``).
        scale: scalar tensor, the learned inverse temperature of the projection head (its exponential already taken);
            bias: scalar tensor for sigmoid pairs.
        pair_scale: two streams -> the scale of their pairs, where it is not the shared one.
        merged: ``[S, D]`` state of the merge backbone (pass ``merge``).
        class_logits: ``[S, C]``; match_logits: ``[S]`` from heads on ``merged``.
        mismatch_logits: ``[N]`` logits of samples in which one stream's items are another sample's (pass ``match``);
            mismatch_samples: ``[N]`` int64 which samples; those without a second stream, or without another sample
            to take it from, are not among them.
        ctc: what the ctc head says of its stream's items (pass ``ctc``).
        latents: ``[S, L, D]`` of a latent backbone (pass ``merge``); queried: per text stream, ``[S, Q, V]`` logits of
            every place from a ``query_token`` head.
        rebuilt: ``[K, C]`` values of hidden patches by a ``masked_patches`` head (pass ``rebuild``);
            rebuilt_targets: ``[K, C]`` what was there.
        pair_logits: ``[V, T]`` of every video against every text (pass ``pairs``); pair_samples: ``([V], [T])`` int64
            the samples that they are of.
    """

    token_logits: Array = None
    token_targets: Array = None
    token_samples: Array = None
    embeddings: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    scale: Array = None
    bias: Array = None
    pair_scale: Callable[[str, str], Array] | None = None
    merged: Array = None
    class_logits: Array = None
    match_logits: Array = None
    mismatch_logits: Array = None
    mismatch_samples: Array = None
    ctc: CtcOutput | None = None
    latents: Array = None
    queried: dict[str, Array] = field(default_factory=dict)
    rebuilt: Array = None
    rebuilt_targets: Array = None
    pair_logits: Array = None
    pair_samples: tuple[Array, Array] | None = None
    tokens: dict[TokenPass, TokenOutput] = field(default_factory=dict)
    """What masked_token heads predict, by pass."""
    pooled: dict[str, Array] = field(default_factory=dict)
    """Per ``pooler`` head: ``[I, D]`` of its stream's items, or ``[S, D]`` of the samples (pass ``pool``)."""
    teacher: Teacher | None = None
    """What the momentum twin says of the same batch, where an objective has one."""
    teachers: dict[str, Outputs] = field(default_factory=dict)
    """What other models say of the same batch, by the path that a ``distill`` objective names."""
    penalties: dict[str, Array] = field(default_factory=dict)
    """Scalar tensors that ``ewc`` objectives add, by their key."""
