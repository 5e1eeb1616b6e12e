"""The processor: samples -> laid-out token sequences -> batches. The same code serves training and answering.

Its work has three steps. ``plan`` lays a sample out from headers alone, ``load`` decodes the media of a plan, and
``collate`` joins examples into a padded or a packed batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polymodal.core.batch import Batch, Example, ModelInput, Plan, Span, StreamBatch
from polymodal.core.config import unknown
from polymodal.core.errors import NoTargetsError, PolymodalError, SampleError, TooLongError
from polymodal.core.parts import Media
from polymodal.core.samples import Sample, named
from polymodal.modalities.reader import Reader, checked_read
from polymodal.modalities.text.chat import ChatFormat
from polymodal.modalities.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """What the processor must know of one stream.

    Args:
        reader: the stream's reader.
        enters_sequence: whether its tokens stand among the text's.
        count_tokens: unit lengths of an item -> the tokens it will give (only for streams that enter the sequence).
        cache_tag: names the reader, the encoder and its weights; part of every feature-cache key.
    """

    reader: Reader
    enters_sequence: bool
    count_tokens: Callable[[tuple[int, ...]], int]
    cache_tag: str = ""


class Processor:
    """Lays samples out for one model.

    Args:
        tokenizer: the model's tokenizer.
        chat: the chat format; None for models without a decoder, which take view sets only.
        streams: per stream name, its layout.
        max_tokens: the longest sequence.
        overflow: what happens to a longer one: ``refuse`` it by name, or ``cut_text``: drop text from its end, which is
            refused as well where the cut would touch a media span or drop every target.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatFormat | None,
        streams: Mapping[str, StreamLayout],
        *,
        max_tokens: int,
        overflow: Literal["refuse", "cut_text"] = "refuse",
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.streams = dict(streams)
        self.max_tokens = max_tokens
        self.overflow = overflow

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
                inputs[name] = [
                    None if cached and cached(keys[name][i]) else checked_read(layout.reader, part, lengths)
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
        )

    def batch(self, samples: Sequence[Sample], *, prompt: bool = False) -> Batch:
        """Plan, load and collate in one go, padded: what answering and embedding use."""
        return self.collate([self.load(self.plan(sample, prompt=prompt)) for sample in samples], packed=False)

    def _plan_conversation(self, sample: Sample, prompt: bool) -> Plan:
        if self.chat is None:
            raise SampleError(sample.id, "is a conversation, but this model has no decoder; expected 'views'")
        plan = Plan(sample.id, [], [], [], {})
        for segment in self.chat.render(sample.messages, id=sample.id, prompt=prompt):
            if segment.media is not None:
                self._place(segment.media, plan)
                continue
            control = segment.control
            ids = [self.tokenizer.control(control)] if control else self.tokenizer.encode(segment.text)
            plan.ids += ids
            plan.is_supervised += [segment.is_supervised] * len(ids)
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

    def _place(self, part: Media, plan: Plan) -> None:
        names = [name for name, layout in self.streams.items() if layout.reader.modality == part.modality]
        if not names:
            takes = sorted({layout.reader.modality for layout in self.streams.values()} - {"text"})
            raise SampleError(plan.id, f"{part.name}: {unknown('modality for this model', part.modality, takes)}")
        for name in names:
            layout = self.streams[name]
            lengths = layout.reader.measure(part)
            items = plan.items.setdefault(name, [])
            if layout.enters_sequence:
                count = layout.count_tokens(lengths)
                plan.spans.append(Span(name, len(items), plan.num_tokens, count))
                plan.ids += [self.tokenizer.media_id] * count
                plan.is_supervised += [False] * count
            items.append((part, lengths))

    def _plan_views(self, sample: Sample) -> Plan:
        plan = Plan(sample.id, [], [], [], {})
        for name, layout in self.streams.items():
            part = sample.views.get(layout.reader.modality)
            if part is not None:
                plan.items[name] = [(part, layout.reader.measure(part))]
        if not plan.items:
            takes = sorted({layout.reader.modality for layout in self.streams.values()})
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
            lengths: list[int] = []
            owners: list[int] = []
            index: list[Any] = []
            tokens: list[int] = []
            for row, example in enumerate(examples):
                items = example.plan.items.get(name, [])
                inputs += example.inputs.get(name, [])
                keys += example.keys.get(name, [])
                counts += [len(unit_lengths) for _, unit_lengths in items]
                lengths += [length for _, unit_lengths in items for length in unit_lengths]
                owners += [row] * len(items)
                for span in (span for span in example.plan.spans if span.stream == name):
                    start = offsets[row] + span.start
                    index.append(np.arange(start, start + span.length))
                    tokens.append(span.length)
            if not counts:
                continue
            streams[name] = StreamBatch(
                values=_stack(inputs, layout.reader) if all(item is not None for item in inputs) else None,
                lengths=np.asarray(lengths, dtype=np.int64),
                unit_counts=counts,
                sample_of_item=np.asarray(owners, dtype=np.int64),
                token_index=np.concatenate(index) if index else np.zeros(0, dtype=np.int64),
                token_counts=tokens,
                keys=keys,
                grids=[item.grid if item is not None else None for item in inputs],
            )
        return streams


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
        return np.stack(units)
    longest = max(len(unit) for unit in units)
    values = np.zeros((len(units), longest, *units[0].shape[1:]), dtype=units[0].dtype)
    for row, unit in enumerate(units):
        values[row, : len(unit)] = unit
    return values


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
