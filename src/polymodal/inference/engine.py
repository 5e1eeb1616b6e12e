"""The engine: prompts -> tokens, with a preallocated key-value cache, batching, streaming and prefix reuse.

Shape legend: ``B`` rows, ``T`` tokens, ``V`` vocabulary, ``E`` embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymodal.core.batch import Batch, Example, Plan
from polymodal.core.errors import SampleError
from polymodal.core.parts import Part
from polymodal.core.samples import Sample
from polymodal.inference.dropped import dropped_words
from polymodal.inference.encoded import FeatureCache, unit_keys
from polymodal.inference.prefix import PrefixCache, identity, media_end, same_media, suffix, until_media
from polymodal.inference.sampling import Sampling, draw, make_generator
from polymodal.modalities.processor import Processor, collate_units
from polymodal.modalities.reader import checked_read
from polymodal.modalities.text.tokenizer import END
from polymodal.models.backbones.decoder import CausalConfig, Decoder
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.encoders.base import Features
from polymodal.models.heads.table import NextTokenConfig
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.dropping import MediaDrop
from polymodal.models.layers.layout import Layout

Finish = Literal["stop", "length"]
Rule = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]
"""Logits ``[B, V]`` of a step and what each row has written -> the logits to draw from."""


@dataclass(slots=True)
class Generation:
    """One generated turn: its token ids without the end token, why it ended, and the prompt's length."""

    ids: list[int] = field(default_factory=list)
    finish: Finish = "length"
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    choices: list[str] = field(default_factory=list)
    """What was lessened to keep a budget of media tokens."""


class Engine:
    """Runs one composed model.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's processor.
        prefix_bytes: size of the prefix cache; 0 switches it off. A quarter of it is for the features of media whose
            tokens no prefix holds.
        drop: media tokens that the decoder goes on without, unless a request says otherwise.
    """

    def __init__(
        self,
        model: MultimodalModel,
        processor: Processor,
        prefix_bytes: int = 256 * 1024**2,
        drop: MediaDrop | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.drop = drop
        self.prefixes = PrefixCache(prefix_bytes)
        self.encoded = FeatureCache(prefix_bytes // 4)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def features(self, stream: str, part: Part) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """An encoder's features ``[U, N, D]`` and pooled vectors ``[U, D]`` of one part, float32.

        Raises:
            MediaError: if the part cannot be used.
        """
        reader = self.processor.streams[stream].reader
        batch = collate_units([checked_read(reader, part, reader.measure(part))], reader)
        values = torch.from_numpy(batch.values).to(self.device)
        found = self.model.encode(
            stream, replace(batch, values=values, lengths=torch.from_numpy(batch.lengths).to(self.device))
        )
        return found.x_UND.float().cpu().numpy(), found.pooled_UD.float().cpu().numpy()

    @torch.inference_mode()
    def generate(
        self, samples: Sequence[Sample], sampling: Sampling, batch_size: int = 64, drop: MediaDrop | None = None
    ) -> list[Generation]:
        """Answer every sample; the result of one does not depend on the others.

        Prompts of similar length share a batch, and so do those that begin alike up to the end of their last medium:
        of a batch, what several begin with is encoded and read once. What one call has read the next does not reuse,
        unlike :meth:`stream`: rows of a batch would be copied into the prefix cache for prompts that may never come.
        Sampling with a seed draws per batch, greedy answers are exact. ``drop`` stands in the place of the engine's.

        Raises:
            SampleError: if a prompt cannot be laid out or leaves no room for an answer.
        """
        self._end_ids()
        plans = [self._plan(sample) for sample in samples]
        alike = same_media(plans) if self._shares(drop) else list(range(len(plans)))
        order = sorted(range(len(plans)), key=lambda i: (plans[alike[i]].num_tokens, alike[i], plans[i].num_tokens))
        results: list[Generation] = [Generation()] * len(plans)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            chosen = [plans[i] for i in rows]
            found = self._generate(chosen, [alike[i] for i in rows], sampling, drop)
            for row, generation in zip(rows, found, strict=True):
                results[row] = generation
        return results

    @torch.inference_mode()
    def stream(
        self,
        sample: Sample,
        sampling: Sampling,
        generation: Generation | None = None,
        drop: MediaDrop | None = None,
    ) -> Iterator[int]:
        """Yield token ids as they are drawn, reusing every prompt prefix read before.

        What a question drops another may need: with ``drop``, no prefix is reused or kept. Where none is, and where
        the words of a question are read beside the media, what encoders said of the media is kept instead.

        Args:
            sample: the conversation to continue.
            sampling: how to draw.
            generation: filled while streaming, for those who want the finish reason.
            drop: stands in the place of the engine's.
        """
        record = generation if generation is not None else Generation()
        ends = self._end_ids()
        plan = self._plan(sample)
        own = identity(plan, self.model.config.watched_streams)
        room = self._room(plan, sampling)
        drop = self._dropping(drop)
        reuses = self.model.decoder.reuses_prefixes and drop is None
        cache, reused = self._prefilled(plan, own, room, reuses)
        record.num_prompt_tokens, record.num_reused_tokens = plan.num_tokens, reused
        record.choices = [*plan.choices, *dropped_words(plan, self._backbone, drop)]
        states = self._read(suffix(plan, reused), cache, reused, drop, reuses)
        generator = make_generator(sampling, self.device)
        try:
            for step in range(room):
                token_B = self._next(states, sampling, generator, [record.ids])
                token = int(token_B[0])
                if token in ends:
                    record.finish = "stop"
                    return
                record.ids.append(token)
                yield token
                if step + 1 < room:
                    states = self._step(token_B, cache)
        finally:
            # The answer is kept as well: the next turn of a conversation begins with it.
            if reuses:
                self.prefixes.put((*own, *record.ids[: cache.length - len(own)]), cache)

    @torch.inference_mode()
    def logits(self, sample: Sample, *, prompt: bool = True) -> Tensor:
        """Logits of every position of the fused sequence (of an encoder-decoder's answer), float32 ``[T, V]``."""
        plan = self._plan(sample) if prompt else self.processor.plan(sample)
        batch = to_device(self.processor.collate([self.processor.load(plan)], packed=False), self.device)
        return self.model.token_logits(self.model.states(batch)[0, plan.num_source :]).float()

    @torch.inference_mode()
    def next_logits(self, example: Example) -> Tensor:
        """Logits of what follows a laid-out example, float32 ``[V]``."""
        batch = to_device(self.processor.collate([example], packed=False), self.device)
        return self.model.token_logits(self.model.states(batch)[0, -1]).float()

    @torch.inference_mode()
    def embed(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Unit vectors per stream of view-set samples: ``{stream: (float32 [I, E], sample index [I])}``."""
        batch = to_device(self.processor.batch(samples), self.device)
        outputs = self.model(batch, passes=("embed",))
        return {
            name: (vectors.float().cpu().numpy(), np.asarray(owners.cpu()))
            for name, (vectors, owners) in outputs.embeddings.items()
        }

    @torch.inference_mode()
    def class_logits(self, samples: Sequence[Sample]) -> Tensor:
        """Logits of the class head for view-set samples, float32 ``[S, C]`` on the CPU.

        Raises:
            ConfigError: if the model has no class head.
        """
        self.model.head("class")
        batch = to_device(self.processor.batch(samples), self.device)
        return torch.as_tensor(self.model(batch, passes=("merge",)).class_logits).float().cpu()

    @torch.inference_mode()
    def match_logits(self, samples: Sequence[Sample]) -> Tensor:
        """The matching head's logit for view-set samples, float32 ``[S]`` on the CPU.

        Raises:
            ConfigError: if the model has no matching head.
        """
        self.model.head("matching")
        batch = to_device(self.processor.batch(samples), self.device)
        return torch.as_tensor(self.model(batch, passes=("merge",)).match_logits).float().cpu()

    def _plan(self, sample: Sample) -> Plan:
        return self.processor.plan(sample, prompt=True)

    def _end_ids(self) -> frozenset[int]:
        """Ids that end an answer: the chat format's end token, and those that the checkpoint names besides."""
        chat = self.processor.chat
        if chat is None:
            raise SampleError("request", "this model has no decoder: it embeds and compares, it does not answer")
        stop_ids: tuple[int, ...] = getattr(self.model.config.backbone, "stop_ids", ())
        tokenizer = self.processor.tokenizer
        if stop_ids and chat.end == END and tokenizer.eos_id is None:
            return frozenset(stop_ids)
        return frozenset((tokenizer.control(chat.end), *stop_ids))

    def _room(self, plan: Plan, sampling: Sampling) -> int:
        room = min(sampling.max_new_tokens, self.processor.max_tokens - plan.num_tokens)
        if room < 1:
            raise SampleError(
                plan.id,
                f"the prompt takes all {self.processor.max_tokens} tokens of the context; "
                "shorten the text, or send fewer or smaller media",
            )
        return room

    @property
    def _backbone(self) -> CausalConfig:
        config = self.model.config.backbone
        assert isinstance(config, CausalConfig)
        return config

    def _dropping(self, drop: MediaDrop | None) -> MediaDrop | None:
        """The request's or the engine's; None for a share of 0, which is exactly the model without."""
        drop = self.drop if drop is None else drop
        return None if drop is None or drop.share == 0 else drop

    def _shares(self, drop: MediaDrop | None) -> bool:
        """Whether rows of a batch may begin with what was read once: nothing a later token says changes it."""
        is_plain = isinstance(self.model.decoder, Decoder) and not self.model.config.watched_streams
        return is_plain and self.model.decoder.reuses_prefixes and self._dropping(drop) is None

    def _generate(
        self, plans: Sequence[Plan], alike: Sequence[int], sampling: Sampling, drop: MediaDrop | None
    ) -> list[Generation]:
        """Continue the plans of one batch; those with an equal number in ``alike`` begin alike."""
        if len({*alike}) == len(plans) or not all(media_end(plan) for plan in plans):
            return self.generate_examples([self.processor.load(plan) for plan in plans], sampling, drop=drop)
        rooms = [self._room(plan, sampling) for plan in plans]
        firsts = [place for place, group in enumerate(alike) if group not in alike[:place]]
        starts, rests = [media_end(plan) for plan in plans], []
        for plan, start in zip(plans, starts, strict=True):
            rests.append(self.processor.load(suffix(plan, start)))
        longest = max(starts) + max(rest.plan.num_tokens for rest in rests)
        cache = self.model.decoder.new_cache(len(firsts), longest + max(rooms))
        heads = [self.processor.load(until_media(plans[place])) for place in firsts]
        self.model.states(to_device(self.processor.collate(heads, packed=False), self.device), cache)
        groups = [alike[place] for place in firsts]
        cache.select(torch.tensor([groups.index(group) for group in alike], device=self.device))
        batch = to_device(self.processor.collate(rests, packed=False), self.device)
        batch.positions = batch.positions + torch.tensor(starts, device=self.device)[:, None]
        states_BTD = self.model.states(batch, cache)
        states_BD = states_BTD[torch.arange(len(plans), device=self.device), batch.is_valid.sum(1) - 1]
        results = [Generation(num_prompt_tokens=plan.num_tokens, choices=list(plan.choices)) for plan in plans]
        for place, result in enumerate(results):
            result.num_reused_tokens = 0 if place in firsts else starts[place]
        return self._continue(results, rooms, (states_BD, cache), sampling, None)

    @torch.inference_mode()
    def generate_examples(
        self,
        examples: Sequence[Example],
        sampling: Sampling,
        rule: Rule | None = None,
        drop: MediaDrop | None = None,
    ) -> list[Generation]:
        """Continue laid-out examples in one batch.

        Args:
            examples: the prompts with their media.
            sampling: how to draw.
            rule: changes the logits ``[B, V]`` of a step, given what each row has written so far.
            drop: stands in the place of the engine's.

        Raises:
            SampleError: if a prompt leaves no room for an answer.
        """
        plans = [example.plan for example in examples]
        rooms = [self._room(plan, sampling) for plan in plans]
        longest = max(plan.num_tokens for plan in plans)
        batch, features = self._encoded(self.processor.collate(examples, packed=False))
        cache = self.model.decoder.new_cache(len(plans), longest + max(rooms))
        drop = self._dropping(drop)
        states_BTD = self.model.states(batch, cache, features, drop)
        last_B = batch.is_valid.sum(1) - 1
        states = states_BTD[torch.arange(len(plans), device=self.device), last_B]
        results = [
            Generation(
                num_prompt_tokens=plan.num_tokens,
                choices=[*plan.choices, *dropped_words(plan, self._backbone, drop)],
            )
            for plan in plans
        ]
        return self._continue(results, rooms, (states, cache), sampling, rule)

    def _continue(
        self,
        results: list[Generation],
        rooms: Sequence[int],
        read: tuple[Tensor, KVCache],
        sampling: Sampling,
        rule: Rule | None,
    ) -> list[Generation]:
        """Fill results, given the last states ``[B, D]`` of the prompts and their cache."""
        states, cache = read
        generator = make_generator(sampling, self.device)
        ends, alive = self._end_ids(), list(range(len(results)))
        while alive:
            token_B = self._next(states, sampling, generator, [results[row].ids for row in alive], rule)
            kept = []
            for row, token in enumerate(token_B.tolist()):
                result = results[alive[row]]
                if token in ends:
                    result.finish = "stop"
                    continue
                result.ids.append(token)
                if len(result.ids) < rooms[alive[row]]:
                    kept.append(row)
            if not kept:
                break
            if len(kept) < len(alive):
                # Finished rows leave the batch, so that no step is spent on them.
                index = torch.tensor(kept, device=self.device)
                cache.select(index)
                token_B, alive = token_B[index], [alive[row] for row in kept]
            states = self._step(token_B, cache)
        return results

    def _next(
        self,
        states_BD: Tensor,
        sampling: Sampling,
        generator: torch.Generator | None,
        written: Sequence[Sequence[int]],
        rule: Rule | None = None,
    ) -> Tensor:
        """The next token of each row, int64 ``[B]``; all rows have written equally much."""
        logits_BV = self.model.token_logits(states_BD)
        suppressed = self._suppressed[0 if written[0] else 1]
        if suppressed:
            index = torch.tensor(suppressed, device=logits_BV.device)
            logits_BV = logits_BV.index_fill(-1, index, -torch.inf)
        if rule is not None:
            logits_BV = rule(logits_BV, written)
        return draw(logits_BV, sampling, generator)

    @cached_property
    def _suppressed(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the head never generates: at any place, and as the first of an answer."""
        heads = self.model.config.heads.values()
        config = next((head for head in heads if isinstance(head, NextTokenConfig)), NextTokenConfig())
        return config.suppress, (*config.suppress, *config.suppress_first)

    def _prefilled(self, plan: Plan, own: tuple[Any, ...], room: int, reuses: bool) -> tuple[KVCache, int]:
        slots = plan.num_tokens + room
        reused, found = self.prefixes.find(plan, own) if reuses else (0, None)
        watched = self.model.config.watched_streams
        if found is None or any(span.stream in watched and span.start >= reused for span in plan.spans):
            # The cache knows what the decoder looks at after the prefix, and no later item.
            return self.model.decoder.new_cache(1, slots), 0
        held = found.clone(max_tokens=max(slots, found.length))
        held.crop(reused)
        return held, reused

    def _read(self, plan: Plan, cache: KVCache, start: int, drop: MediaDrop | None, reuses: bool) -> Tensor:
        """Prefill the rest of a prompt; returns the last state ``[1, D]``."""
        batch = self.processor.collate([self.processor.load(plan)], packed=False)
        batch.positions = batch.positions + start
        batch, features = self._encoded(batch, every=not reuses)
        return self.model.states(batch, cache, features, drop)[:, -1]

    def _encoded(self, batch: Batch, *, every: bool = False) -> tuple[Batch, dict[str, Features]]:
        """A batch on the device, and the features of media that may be asked about again in other words.

        Args:
            batch: as the processor collates it.
            every: whether no prefix of the prompts is kept; else only media that are read together with words.
        """
        names = [n for n, stream in batch.streams.items() if stream.features is None and self._is_kept(n, every)]
        keys = {name: unit_keys(name, batch.streams[name]) for name in names}
        batch = to_device(batch, self.device)
        return batch, {
            name: self.encoded.features(partial(self.model.encode, name), batch.streams[name], keys[name])
            for name in names
        }

    def _is_kept(self, name: str, every: bool) -> bool:
        config = self.model.config
        reads_words = config.instruction_stream is not None and getattr(config.streams[name].connector, "words", False)
        return config.streams[name].modality != "text" and (reads_words or every)

    def _step(self, token_B: Tensor, cache: KVCache) -> Tensor:
        """Read one token per row; returns the new states ``[B, D]``."""
        x_BTD = self.model.decoder.embed(token_B[:, None])
        layout = Layout(causal=True, positions_BT=cache.lengths_B[:, None])
        return torch.as_tensor(self.model.decoder(x_BTD, layout, cache))[:, -1]
