"""The proofs that concern samples: that they can be laid out, are supervised, decode, fill their places, stay apart.

Shape legend: ``S`` samples, ``K`` supervised tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polymodal.core.batch import Batch, Example, Plan
from polymodal.core.config import unknown
from polymodal.core.errors import CheckFailed, NoTargetsError, TooLongError
from polymodal.core.samples import Sample
from polymodal.data.planner import BAD_SAMPLE
from polymodal.data.protocols import Source
from polymodal.models.compose import to_device
from polymodal.objectives.classify import Classify
from polymodal.objectives.matching import Matching
from polymodal.recipes.assemble import Assembly
from polymodal.training.stage import StageConfig

NUM_PROBED = 64
"""Samples of each source that the proofs read."""
NUM_COMPARED = 8
"""Samples that are run alone, packed and padded."""
TOLERANCE = 1e-5
"""Largest relative difference between what must be equal up to the order of float32 sums."""


@dataclass(slots=True)
class Probe:
    """Samples of a stage's data, drawn at random with a fixed seed, and how far each came.

    Args:
        parts: the assembled recipe.
        stage: the stage.
        samples: what could be read, with their plans; an absent plan has an entry in ``failures``.
        examples: what could be decoded.
        failures: what is wrong with the others.
    """

    parts: Assembly
    stage: StageConfig
    samples: list[Sample] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    num_drawn: int = 0
    failures: list[Exception] = field(default_factory=list)
    damaged: list[Exception] = field(default_factory=list)

    @classmethod
    def draw(cls, parts: Assembly, stage: StageConfig, sources: Sequence[Source]) -> Probe:
        """Read, plan and decode at most :data:`NUM_PROBED` samples of each source."""
        probe = cls(parts, stage)
        for source in sources:
            # Not every n-th sample: sources repeat their modalities in a fixed order, and a stride may miss some.
            chosen = sorted(random.Random(0).sample(range(len(source)), min(NUM_PROBED, len(source))))
            for index in chosen:
                probe._take(source, index)
        return probe

    def _take(self, source: Source, index: int) -> None:
        self.num_drawn += 1
        try:
            sample = source[index]
            plan = self.parts.processor.plan(sample)
            if self.stage.batch.tokens is not None and plan.num_tokens > self.stage.batch.tokens:
                raise TooLongError(
                    plan.id, f"has {plan.num_tokens} tokens, a batch of this stage takes {self.stage.batch.tokens}"
                )
        except BAD_SAMPLE as error:
            self.failures.append(error)
            return
        self.samples.append(sample)
        self.plans.append(plan)
        try:
            self.examples.append(self.parts.processor.load(plan))
        except BAD_SAMPLE as error:
            self.damaged.append(error)

    @property
    def conversations(self) -> list[Example]:
        """The examples with token ids."""
        return [example for example in self.examples if example.plan.ids]

    def tolerate(self, bad: Sequence[Exception], what: str) -> str:
        """Words for a share of bad samples that training would pass over.

        Raises:
            CheckFailed: if the share is above the recipe's ``max_bad_rate``, or nothing is left.
        """
        if not bad:
            return ""
        rate, limit = len(bad) / self.num_drawn, self.parts.recipe.max_bad_rate
        found = f"{len(bad)} of {self.num_drawn} samples {what} ({rate:.1%}); the first: {bad[0]}"
        if rate > limit or len(bad) == self.num_drawn:
            raise CheckFailed(f"{found}. At most {limit:.1%} are tolerated (max_bad_rate)")
        return f"; {found}"


def layout(probe: Probe) -> str:
    """Every sample can be read and laid out, apart from what the next two proofs look at."""
    other = [error for error in probe.failures if not isinstance(error, NoTargetsError | TooLongError)]
    bad = probe.tolerate(other, "cannot be laid out")
    return f"{len(probe.plans)} of {probe.num_drawn} samples{bad}"


def fit(probe: Probe) -> str:
    """No sample is too long, and every media span stands whole in its sequence."""
    bad = probe.tolerate([error for error in probe.failures if isinstance(error, TooLongError)], "are too long")
    media_id, longest = probe.parts.tokenizer.media_id, 0
    for plan in probe.plans:
        longest = max(longest, plan.num_tokens)
        promised = sum(span.length for span in plan.spans)
        for span in plan.spans:
            places = plan.ids[span.start : span.start + span.length]
            if len(places) < span.length or any(id != media_id for id in places):
                raise CheckFailed(
                    f"sample {plan.id}: an item of stream {span.stream!r} takes tokens {span.start} to "
                    f"{span.start + span.length}, {places.count(media_id)} of its {span.length} places are there in a "
                    f"sequence of {plan.num_tokens}: its span is cut"
                )
        # Where the placeholder is a token that stands for something else as well, only the spans say what is media.
        if probe.parts.tokenizer.names.media is not None and plan.ids.count(media_id) != promised:
            raise CheckFailed(
                f"sample {plan.id}: {plan.ids.count(media_id)} placeholders stand in the sequence, its spans hold "
                f"{promised}"
            )
    return f"longest {longest:,} of {probe.parts.processor.max_tokens:,} tokens{bad}"


def supervised(probe: Probe) -> str | None:
    """Every conversation has a token to learn from."""
    bad = probe.tolerate([error for error in probe.failures if isinstance(error, NoTargetsError)], "have no target")
    plans = [plan for plan in probe.plans if plan.ids]
    objectives = probe.stage.parsed_objectives()
    reads_views = [entry.name for entry in objectives if entry.config.needs not in ("sequence", None)]
    views = [plan.id for plan in probe.plans if not plan.ids]
    found = f"{len(views)} of {len(probe.plans)} samples are view sets, the first is {views[:1]}"
    if views and not reads_views:
        raise CheckFailed(
            f"{found}; the objective {objectives[0].name!r} reads conversations alone, give the views a stage of their "
            "own"
        )
    if views and plans and probe.stage.batch.packed:
        raise CheckFailed(f"{found}, which have no tokens to pack; set the batch by samples instead of by tokens")
    if not plans:
        return None
    empty = [plan.id for plan in plans if not any(plan.is_supervised)]
    if empty:
        raise CheckFailed(f"{len(empty)} of {len(plans)} samples have no supervised token, the first is {empty[0]!r}")
    learned, total = sum(sum(plan.is_supervised) for plan in plans), sum(plan.num_tokens for plan in plans)
    return f"{learned:,} of {total:,} tokens ({learned / total:.1%}){bad}"


def targets(probe: Probe) -> str | None:
    """What is supervised must decode to what the assistant said: nothing hidden, nothing of the user's."""
    count = 0
    for sample, plan in zip(probe.samples, probe.plans, strict=True):
        if not plan.ids:
            continue
        # Spaces aside: some formats have the assistant begin with one.
        said = _letters("".join(message.text for message in sample.messages if message.role == "assistant"))
        ids = [id for id, is_target in zip(plan.ids, plan.is_supervised, strict=True) if is_target]
        found = _letters(probe.parts.tokenizer.decode(ids))
        is_whole = plan.num_tokens < probe.parts.processor.max_tokens
        if (is_whole and found != said) or not said.startswith(found):
            raise CheckFailed(f"sample {plan.id}: the targets read {found[:60]!r}, the assistant said {said[:60]!r}")
        count += 1
    return f"{count} samples, word for word" if count else None


def _letters(text: str) -> str:
    return "".join(text.split())


def labels(probe: Probe) -> str | None:
    """The labels in the data are those that the stage's objectives know."""
    figures = []
    for name, _, objective in probe.stage.parsed_objectives():
        if isinstance(objective, Classify):
            valid: Sequence[str] = objective.classes
        elif isinstance(objective, Matching) and objective.negatives == "labels":
            valid = (objective.positive, objective.negative)
        else:
            continue
        found = [(plan.id, plan.label) for plan in probe.plans if plan.label is not None]
        if not found:
            raise CheckFailed(f"objective {name!r}: none of {len(probe.plans)} samples has a label")
        for id, label in found:
            if label not in valid:
                raise CheckFailed(f"objective {name!r}: sample {id}: {unknown('label', label, valid)}")
        used = len({label for _, label in found})
        figures.append(f"{len(found)} of {len(probe.plans)} samples, {used} of {len(valid)} labels occur")
    return "; ".join(figures) or None


def decode(probe: Probe) -> str:
    """Every media item decodes, and has the size that its header promised."""
    bad = probe.tolerate(probe.damaged, "have damaged media")
    count = sum(len(items) for example in probe.examples for items in example.inputs.values())
    return f"{count:,} items{bad}"


def placeholders(probe: Probe) -> str | None:
    """Count what the modules really give for every item, against the places laid out for it (in a memory: derived)."""
    parts, counted = probe.parts, 0
    examples = probe.conversations
    for start in range(0, len(examples), 16):
        batch = join(parts, examples[start : start + 16], packed=False)
        model = parts.recipe.model
        for name in (*model.sequence_streams, *model.watched_streams):
            stream = batch.streams.get(name)
            if stream is None:
                continue
            with torch.no_grad():
                found = len(parts.network.connect(name, parts.network.encode(name, stream), stream))
            items = [item for example in examples[start : start + 16] for item in example.plan.items.get(name, ())]
            expected = sum(model.count_tokens(name, lengths) for _, lengths in items)
            if name in model.sequence_streams:
                expected = len(stream.token_index)
            if found != expected:
                raise CheckFailed(
                    f"stream {name!r}: {expected} placeholders for {found} features of {len(stream.unit_counts)} items"
                )
            counted += found
    return f"{counted:,} = {counted:,}" if counted else None


def packing(probe: Probe) -> str | None:
    """Each sample's loss and the gradient of all, alone and packed; and what changing one sample does to the others."""
    examples, parts = probe.conversations[:NUM_COMPARED], probe.parts
    if len(examples) < 2:
        return None
    parts.network.eval()
    batch = join(parts, examples, packed=True)
    packed, packed_grad = _losses_and_gradient(parts, [batch])
    alone, alone_grad = _losses_and_gradient(parts, [join(parts, [example], packed=False) for example in examples])
    leak = max(_leak(parts, batch, packed, changed) for changed in (0, len(examples) - 1))
    if leak != 0.0:
        raise CheckFailed(f"changing one sample of a pack changes another's loss by {leak:.2e}; expected exactly 0")
    worst = max(_worst(packed, alone), float((packed_grad - alone_grad).norm() / alone_grad.norm().clamp(min=1e-12)))
    if worst > TOLERANCE:
        raise CheckFailed(
            f"a sample's loss or gradient alone and packed differs by {worst:.2e} (relative); allowed {TOLERANCE:.0e}"
        )
    return f"{len(examples)} samples: largest relative difference {worst:.1e}, leak 0"


@torch.no_grad()
def padding(probe: Probe) -> str | None:
    """Each sample's loss alone, beside longer ones, and in the other order."""
    examples, parts = probe.conversations[:NUM_COMPARED], probe.parts
    if len(examples) < 2:
        return None
    parts.network.eval()
    forward = sample_losses(parts, join(parts, examples, packed=False))
    backward = sample_losses(parts, join(parts, examples[::-1], packed=False)).flip(0)
    alone = torch.cat([sample_losses(parts, join(parts, [example], packed=False)) for example in examples])
    worst = max(_worst(forward, alone), _worst(backward, alone))
    if worst > TOLERANCE:
        raise CheckFailed(
            f"padding or order changes a sample's loss by {worst:.2e} (relative); allowed {TOLERANCE:.0e}"
        )
    return f"{len(examples)} samples: largest relative difference {worst:.1e}"


def join(parts: Assembly, examples: Sequence[Example], *, packed: bool) -> Batch:
    """The examples as one batch on the network's device."""
    device = next(parts.network.parameters()).device
    return to_device(parts.processor.collate(examples, packed), device)


def sample_losses(parts: Assembly, batch: Batch) -> Tensor:
    """Next-token loss of each sample, summed over its targets, ``[S]``."""
    outputs = parts.network(batch, ("sequence",))
    losses_K = nn.functional.cross_entropy(outputs.token_logits.float(), outputs.token_targets, reduction="none")
    return losses_K.new_zeros(batch.num_samples).index_add(0, outputs.token_samples, losses_K)


def _losses_and_gradient(parts: Assembly, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """The losses of all samples in order, and the gradient of their sum as one vector."""
    found: list[Tensor] = []
    parameters = list(parts.network.parameters())
    for batch in batches:
        losses_S = sample_losses(parts, batch)
        losses_S.sum().backward()  # type: ignore[no-untyped-call]
        found.append(losses_S.detach())
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    parts.network.zero_grad(set_to_none=True)
    return torch.cat(found), gradient


@torch.no_grad()
def _leak(parts: Assembly, batch: Batch, expected_S: Tensor, changed: int) -> float:
    """Replace the tokens of one sample of a pack, its media apart; the largest change of another's loss."""
    assert batch.segment_lengths is not None
    start = sum(batch.segment_lengths[:changed])
    stop = start + batch.segment_lengths[changed]
    original = batch.ids.clone()
    batch.ids[0, start:stop] = parts.tokenizer.pad_id
    found_S = sample_losses(parts, batch)
    batch.ids.copy_(original)
    difference_S = (found_S - expected_S).abs()
    difference_S[changed] = 0.0
    return float(difference_S.max())


def _worst(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().clamp(min=1e-6)).max())
