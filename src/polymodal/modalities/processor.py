"""The processor: samples -> laid-out token sequences -> batches. The same code serves training and answering.

Its work has three steps. ``plan`` lays a sample out from headers alone, ``load`` decodes the media of a plan, and
``collate`` joins examples into a padded or a packed batch.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polymodal.core.batch import Batch, Example, ModelInput, Plan, Span, StreamBatch
from polymodal.core.config import unknown
from polymodal.core.errors import NoTargetsError, PolymodalError, SampleError, TooLongError
from polymodal.core.parts import Media, Text
from polymodal.core.samples import Sample, named
from polymodal.modalities.budget import Choice, Want, fit_budget
from polymodal.modalities.reader import Reader, checked_read
from polymodal.modalities.text.chat import Chat, Segment, tokenize
from polymodal.modalities.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """What the processor must know of one stream.

    Args:
        reader: the stream's reader.
        enters_sequence: whether its tokens stand among the text's.
        count_tokens: unit lengths of an item -> the tokens it will give (only for streams that enter the sequence).
        view: the view of a sample that it reads, where that is not the modality's; then media of conversations are not
            for it.
        tokens: the most tokens of all its items in a sample; None: any number.
        around: control token that stands before and behind each item's tokens, once between neighbours.
        is_instruction: whether it reads the words of the last user turn, where there are media.
        cache_tag: names the reader, the encoder and its weights; part of every feature-cache key.
    """

    reader: Reader
    enters_sequence: bool
    count_tokens: Callable[[tuple[int, ...]], int]
    cache_tag: str = ""
    view: str | None = None
    around: str | None = None
    tokens: int | None = None
    is_instruction: bool = False


class Processor:
    """Lays samples out for one model.

    Args:
        tokenizer: the model's tokenizer.
        chat: the chat format; None for models without a decoder, which take view sets only.
        streams: per stream name, its layout.
        max_tokens: the longest sequence.
        overflow: what happens to a longer one: ``refuse`` it by name, or ``cut_text``: drop text from its end, which is
            refused as well where the cut would touch a media span or drop every target.
        tokens: the most tokens of all media of a sample, unless the sample says its own; None: any number.
        has_source: whether everything before the last answer goes to an encoder of its own (``Plan.num_source``).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: Chat | None,
        streams: Mapping[str, StreamLayout],
        *,
        max_tokens: int,
        overflow: Literal["refuse", "cut_text"] = "refuse",
        has_source: bool = False,
        tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.streams = dict(streams)
        self.max_tokens = max_tokens
        self.overflow = overflow
        self.has_source = has_source
        self.tokens = tokens

    def plan(self, sample: Sample, *, prompt: bool = False) -> Plan:
        """Lay a sample out from headers alone.

        Args:
            sample: a conversation or a view set.
            prompt: end with the opening of an assistant turn, for generation.

        Raises:
            SampleError: if it cannot be laid out; names the sample, and the media item where one is at fault.
        """
        try:
            plan = self._plan_conversation(sample, prompt) if sample.messages else self._plan_views(sample)
        except PolymodalError as error:
            raise named(sample, error) from None
        plan.label = sample.label
        plan.meta = dict(sample.meta)
        return plan

    def with_streams(self, streams: Mapping[str, StreamLayout]) -> Processor:
        """The same processor with other layouts of its streams."""
        other = copy.copy(self)
        other.streams = dict(streams)
        return other

    def reserve(self, plans: Sequence[Plan]) -> None:
        """Make the array of one batch for every stream whose units have a fixed shape, for :meth:`load` to fill.

        A plan of another batch, or of none, loads as well; its units are copied when they are joined.
        """
        for name, layout in self.streams.items():
            counts = [sum(len(lengths) for _, lengths in plan.items.get(name, ())) for plan in plans]
            if layout.reader.is_ragged or not any(counts):
                continue
            values = np.empty((sum(counts), *layout.reader.unit_shape), np.float32)
            start = 0
            for plan, count in zip(plans, counts, strict=True):
                plan.rows[name] = values[start : start + count]
                start += count

    def load(self, plan: Plan, has_features: Callable[[str], bool] | None = None) -> Example:
        """Decode the media of a plan.

        Args:
            plan: from :meth:`plan`.
            has_features: given a feature-cache key, whether features are stored; such items are not decoded.

        Raises:
            SampleError: if a media item is damaged; names both.
        """
        inputs: dict[str, list[ModelInput | None]] = {}
        keys: dict[str, list[str]] = {}
        try:
            for name, items in plan.items.items():
                layout = self.streams[name]
                cached = has_features if layout.cache_tag else None
                keys[name] = [f"{layout.cache_tag}:{part.content_key()}" for part, _ in items] if cached else []
                places = _places(plan.rows.get(name), items)
                inputs[name] = [
                    None if cached and cached(keys[name][i]) else read_item(layout.reader, part, lengths, places[i])
                    for i, (part, lengths) in enumerate(items)
                ]
        except PolymodalError as error:
            raise SampleError(plan.id, str(error)) from None
        return Example(plan, inputs, keys)

    def collate(self, examples: Sequence[Example], packed: bool) -> Batch:
        """Join examples into one batch (see :class:`Batch` for the two layouts)."""
        plans = [example.plan for example in examples]
        layout = _pack(plans) if packed else _pad(plans, self.tokenizer.pad_id)
        offsets = layout.pop("offsets")
        return Batch(
            **layout,
            streams=self._collate_streams(examples, offsets),
            sample_ids=[plan.id for plan in plans],
            labels=[plan.label for plan in plans],
            modalities=[plan.modalities for plan in plans],
            source_lengths=tuple(plan.num_source for plan in plans) if self.has_source else None,
        )

    def batch(self, samples: Sequence[Sample], *, prompt: bool = False) -> Batch:
        """Plan, load and collate in one go, padded: what answering and embedding use."""
        return self.collate([self.load(self.plan(sample, prompt=prompt)) for sample in samples], packed=False)

    def _plan_conversation(self, sample: Sample, prompt: bool) -> Plan:
        if self.chat is None:
            raise SampleError(sample.id, "is a conversation, but this model has no decoder; expected 'views'")
        plan = Plan(sample.id, [], [], [], {})
        chosen = self._within_budget(sample, plan)
        segments = self.chat.render(sample.messages, id=sample.id, prompt=prompt)
        if self.has_source:
            segments = list(self._lay_out_source(sample, segments, plan, chosen))
        self._lay_out(segments, plan, chosen)
        self._add_instruction(sample, plan)
        if not plan.ids or plan.is_supervised[0]:
            raise SampleError(sample.id, "has no token before its first target; expected a role or a question first")
        if not prompt:
            self._fit(plan)
            if not any(plan.is_supervised):
                raise NoTargetsError(sample.id, "has no supervised tokens; expected an assistant message with text")
        elif plan.num_tokens > self.max_tokens:
            raise TooLongError(sample.id, f"the prompt has {plan.num_tokens} tokens, max_tokens is {self.max_tokens}")
        plan.modalities = tuple(sorted({part.modality for part in sample.media()}))
        return plan

    def _add_instruction(self, sample: Sample, plan: Plan) -> None:
        """What is asked last, for the stream that reads it beside the media."""
        for name, layout in self.streams.items():
            if layout.is_instruction and plan.items:
                asked = next((message for message in reversed(sample.messages) if message.role == "user"), None)
                words = Text("" if asked is None else asked.text)
                plan.items[name] = [(words, layout.reader.measure(words))]
                return

    def _within_budget(self, sample: Sample, plan: Plan) -> Iterator[Choice] | None:
        """How each item that enters the sequence is read, in order; None where each is as its stream's reader says."""
        total = self.tokens if sample.tokens is None else sample.tokens
        budgets = {name: layout.tokens for name, layout in self.streams.items() if layout.tokens is not None}
        readers = self._readers(sample, plan)
        if total is None and not budgets and all(readers[name] is self.streams[name].reader for name in readers):
            return None
        wants = [
            Want(name, part, readers[name], self.streams[name].count_tokens)
            for part in sample.media()
            for name in self._streams_of(part, plan)
            if self.streams[name].enters_sequence
        ]
        chosen, plan.choices = fit_budget(wants, total, budgets, sample.id)
        return iter(chosen)

    def _readers(self, sample: Sample, plan: Plan) -> dict[str, Reader]:
        """What reads the items of each stream that enters the sequence; it may depend on how many there are."""
        counts = Counter(name for part in sample.media() for name in self._streams_of(part, plan))
        return {
            name: self.streams[name].reader.among(count)
            for name, count in counts.items()
            if self.streams[name].enters_sequence
        }

    def _lay_out(self, segments: Sequence[Segment], plan: Plan, chosen: Iterator[Choice] | None) -> None:
        for run in tokenize(segments, self.tokenizer):
            if run.media is not None:
                self._place(run.media, plan, chosen)
                continue
            plan.ids += run.ids
            plan.is_supervised += [run.is_supervised] * len(run.ids)

    def _lay_out_source(
        self, sample: Sample, segments: Sequence[Segment], plan: Plan, chosen: Iterator[Choice] | None
    ) -> Sequence[Segment]:
        """Lay out everything before the last answer, which an encoder reads, and the answer's opening; the rest."""
        assert self.chat is not None
        messages = sample.messages
        is_answered = bool(messages) and messages[-1].role == "assistant"
        asked = messages[:-1] if is_answered else messages
        count = len(self.chat.render(asked, id=sample.id))
        self._lay_out(segments[:count], plan, chosen)
        plan.num_source, plan.is_supervised = plan.num_tokens, [False] * plan.num_tokens
        opening = next((place for place, item in enumerate(segments[count:]) if not item.control), len(segments))
        self._lay_out(segments[count : count + opening], plan, chosen)
        return segments[count + opening :]

    def _streams_of(self, part: Media, plan: Plan) -> list[str]:
        """The streams that read a part of a conversation."""
        streams = self.streams.items()
        names = [name for name, layout in streams if layout.view is None and layout.reader.modality == part.modality]
        if not names:
            takes = sorted({layout.reader.modality for layout in self.streams.values()} - {"text"})
            if not takes:
                raise SampleError(plan.id, f"{part.name}: is {part.modality}, this model takes text alone")
            raise SampleError(plan.id, f"{part.name}: {unknown('modality for this model', part.modality, takes)}")
        return names

    def _place(self, part: Media, plan: Plan, chosen: Iterator[Choice] | None) -> None:
        for name in self._streams_of(part, plan):
            layout = self.streams[name]
            items = plan.items.setdefault(name, [])
            choice = next(chosen) if chosen is not None and layout.enters_sequence else None
            lengths = layout.reader.measure(part) if choice is None else choice.lengths
            if layout.enters_sequence:
                tokens = layout.count_tokens(lengths) if choice is None else choice.tokens
                pool = 1 if choice is None else choice.pool
                count = -(-tokens // pool)
                around = [] if layout.around is None else [self.tokenizer.control(layout.around)]
                last = plan.spans[-1] if plan.spans else None
                if not (last and plan.ids[last.start + last.length :] == around):
                    plan.ids += around
                    plan.is_supervised += [False] * len(around)
                plan.spans.append(Span(name, len(items), plan.num_tokens, count, tokens, pool))
                plan.ids += [self.tokenizer.media_id] * count
                plan.ids += around
                plan.is_supervised += [False] * (count + len(around))
            # An item that is read in another way is other content, to every cache.
            is_usual = choice is None or (choice.lost <= 1 and choice.reader is layout.reader)
            items.append((part if is_usual else choice, lengths))

    def _plan_views(self, sample: Sample) -> Plan:
        plan = Plan(sample.id, [], [], [], {})
        for name, layout in self.streams.items():
            view, modality = layout.view or layout.reader.modality, layout.reader.modality
            part = sample.views.get(view)
            if part is not None and part.modality != modality:
                raise SampleError(sample.id, f"view {view!r} is {part.modality}, the stream {name!r} reads {modality}")
            if part is not None:
                plan.items[name] = [(part, layout.reader.measure(part))]
        if not plan.items:
            takes = sorted({layout.view or layout.reader.modality for layout in self.streams.values()})
            raise SampleError(sample.id, f"has views {sorted(sample.views)}, this model takes {takes}")
        plan.modalities = tuple(sorted(name for name in sample.views if name != "text"))
        return plan

    def _fit(self, plan: Plan) -> None:
        if plan.num_tokens <= self.max_tokens:
            return
        found = f"has {plan.num_tokens} tokens, max_tokens is {self.max_tokens}"
        if self.overflow == "refuse":
            raise TooLongError(plan.id, f"{found}; raise max_tokens, or set overflow: cut_text")
        cut = [span for span in plan.spans if span.start + span.length > self.max_tokens]
        if cut:
            raise TooLongError(
                plan.id,
                f"{found}; cutting there would cut through or drop {len(cut)} media span(s), "
                f"the first of stream {cut[0].stream!r} at tokens {cut[0].start}..{cut[0].start + cut[0].length}",
            )
        del plan.ids[self.max_tokens :], plan.is_supervised[self.max_tokens :]

    def _collate_streams(self, examples: Sequence[Example], offsets: Sequence[int]) -> dict[str, StreamBatch]:
        streams = {}
        for name, layout in self.streams.items():
            inputs: list[ModelInput | None] = []
            keys: list[str] = []
            counts: list[int] = []
            units: list[tuple[int, ...]] = []
            lengths: list[int] = []
            owners: list[int] = []
            index: list[Any] = []
            tokens: list[int] = []
            pools: list[tuple[int, int]] = []
            for row, example in enumerate(examples):
                items = example.plan.items.get(name, [])
                inputs += example.inputs.get(name, [])
                keys += example.keys.get(name, [])
                counts += [len(unit_lengths) for _, unit_lengths in items]
                units += [unit_lengths for _, unit_lengths in items]
                lengths += [length for _, unit_lengths in items for length in unit_lengths]
                owners += [row] * len(items)
                for span in (span for span in example.plan.spans if span.stream == name):
                    start = offsets[row] + span.start
                    index.append(np.arange(start, start + span.length))
                    tokens.append(span.length)
                    pools.append((span.tokens, span.pool))
            if not counts:
                continue
            streams[name] = StreamBatch(
                values=_stack(inputs, layout.reader) if all(item is not None for item in inputs) else None,
                lengths=np.asarray(lengths, dtype=np.int64),
                unit_counts=counts,
                sample_of_item=np.asarray(owners, dtype=np.int64),
                token_index=np.concatenate(index) if index else np.zeros(0, dtype=np.int64),
                token_counts=tokens,
                pools=pools if any(pool > 1 for _, pool in pools) else [],
                keys=keys,
                grids=[item.grid if item is not None else None for item in inputs],
                items=units,
            )
        return streams


def _places(rows_U: Any, items: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Any]:
    """The reserved rows of each item, or None for each."""
    if rows_U is None:
        return [None] * len(items)
    ends = itertools.accumulate(len(lengths) for _, lengths in items)
    return [rows_U[end - len(lengths) : end] for end, (_, lengths) in zip(ends, items, strict=True)]


def read_item(reader: Reader, part: Any, lengths: tuple[int, ...], rows_U: Any = None) -> ModelInput:
    """An item of a plan by its stream's reader, or by the one that a budget chose for it; units go into ``rows_U``."""
    if isinstance(part, Choice):
        return checked_read(part.reader, part.part, lengths, rows_U)
    return checked_read(reader, part, lengths, rows_U)


def collate_units(inputs: Sequence[ModelInput], reader: Reader) -> StreamBatch:
    """The units of some items as one stream batch that belongs to no sequence: for encoding alone."""
    return StreamBatch(
        values=_stack(inputs, reader),
        lengths=np.asarray([length for item in inputs for length in item.lengths], dtype=np.int64),
        unit_counts=[len(item.units) for item in inputs],
        sample_of_item=np.arange(len(inputs), dtype=np.int64),
        token_index=np.zeros(0, dtype=np.int64),
        token_counts=[],
    )


def _stack(inputs: Sequence[ModelInput | None], reader: Reader) -> Any:
    """All units in one array, zero-padded along the ragged axis."""
    units = [unit for item in inputs if item is not None for unit in item.units]
    if not reader.is_ragged:
        base = units[0].base
        return base if _are_rows(units, base) else np.stack(units)
    longest = max(len(unit) for unit in units)
    values = np.zeros((len(units), longest, *units[0].shape[1:]), dtype=units[0].dtype)
    for row, unit in enumerate(units):
        values[row, : len(unit)] = unit
    return values


def _are_rows(units: Sequence[Any], base: Any) -> bool:
    """Whether the units are all rows of one array, in order: they were read into their batch."""
    if base is None or base.shape != (len(units), *units[0].shape):
        return False
    start, step = base.ctypes.data, base.strides[0]
    return all(
        unit.base is base and unit.__array_interface__["data"][0] == start + row * step
        for row, unit in enumerate(units)
    )


def _pack(plans: Sequence[Plan]) -> dict[str, Any]:
    """One row in which the samples follow each other."""
    counts = [plan.num_tokens for plan in plans]
    total = sum(counts)
    ids = np.fromiter((id for plan in plans for id in plan.ids), np.int64, total)
    supervised = np.fromiter((flag for plan in plans for flag in plan.is_supervised), np.bool_, total)
    positions = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, np.int64)
    return {
        "ids": ids[None],
        "is_supervised": supervised[None],
        "is_valid": np.ones((1, total), dtype=np.bool_),
        "positions": positions[None].astype(np.int64),
        "segment_lengths": tuple(counts),
        "offsets": [0, *np.cumsum(counts)[:-1].tolist()],
    }


def _pad(plans: Sequence[Plan], pad_id: int) -> dict[str, Any]:
    """One row per sample, padded on the right."""
    longest = max((plan.num_tokens for plan in plans), default=0)
    shape = (len(plans), longest)
    ids = np.full(shape, pad_id, dtype=np.int64)
    supervised = np.zeros(shape, dtype=np.bool_)
    valid = np.zeros(shape, dtype=np.bool_)
    for row, plan in enumerate(plans):
        ids[row, : plan.num_tokens] = plan.ids
        supervised[row, : plan.num_tokens] = plan.is_supervised
        valid[row, : plan.num_tokens] = True
    positions = np.broadcast_to(np.arange(longest, dtype=np.int64), shape).copy()
    return {
        "ids": ids,
        "is_supervised": supervised,
        "is_valid": valid,
        "positions": positions,
        "segment_lengths": None,
        "offsets": [row * longest for row in range(len(plans))],
    }
