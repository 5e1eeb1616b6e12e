"""The run of a captions task: what a model writes of each medium, under each condition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from polymodal.core.errors import DataError
from polymodal.core.parts import Media, Text
from polymodal.core.samples import Sample
from polymodal.evaluation.baselines import Progress, asked, tried
from polymodal.evaluation.caption_scores import fact_pattern, read_things
from polymodal.evaluation.predictions import Predictions, Record
from polymodal.evaluation.tasks import CaptionsTask, limited, read_samples


class Captioner(Protocol):
    """What writes captions."""

    def caption(self, media: Sequence[Media | None], request: str, *, max_new_tokens: int) -> list[str]:
        """Greedy captions; None stands for no medium."""


def write_all(model: Captioner, task: CaptionsTask, stored: Predictions, progress: Progress) -> Iterator[Record]:
    """A record of each caption: condition, sample, what was written, and the text that stands with the medium.

    Raises:
        DataError: if no sample has the medium and a text.
    """
    usable = [
        sample
        for sample in read_samples(task.data)
        if isinstance(sample.views.get(task.media), Media) and isinstance(sample.views.get("text"), Text)
    ]
    if not usable:
        raise DataError(f"{task.data}: found no sample with the views {task.media!r} and 'text', expected some")
    if len({sample.id for sample in usable}) < len(usable):
        raise DataError(f"{task.data}: samples share ids; make them unique")
    samples = limited(usable, task.limit, task.seed)
    ids, references = [s.id for s in samples], [t.text for s in samples if isinstance(t := s.views["text"], Text)]
    full: list[Record] = []
    ask = partial(_captions, model, task)
    for reference, (_, sample, result) in zip(
        references, asked([("full", samples)], ask, task.batch_size, stored, progress), strict=True
    ):
        full.append({"prediction": "", **result})
        yield from _records("full", [sample.id], [reference], full[-1:])
    if "blind" in task.conditions:
        # Greedy words without a medium are the same for every sample.
        blind = {"prediction": "", **tried(ask, [Sample("blind")])[0]}
        yield from _records("blind", ids, references, [blind] * len(ids))
        progress("blind", 1, 1)
    if "shuffled" in task.conditions and len(ids) > 1:
        order = np.random.default_rng(task.seed).permutation(len(ids))
        others = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
        dealt = [{"prediction": full[others[place]]["prediction"]} for place in range(len(ids))]
        yield from _records("shuffled", ids, references, dealt)
    if "majority" in task.conditions:
        yield from _records("majority", ids, references, [{"prediction": most_shared(references, task)}] * len(ids))


def most_shared(references: Sequence[str], task: CaptionsTask) -> str:
    """The reference whose things stand most often among all: the best single caption."""
    pattern = fact_pattern(task.facts)
    things = [[tuple(thing.items()) for thing in read_things(text, pattern)] for text in references]
    counts = Counter(thing for told in things for thing in set(told))
    return max(zip(references, things, strict=True), key=lambda pair: sum(counts[thing] for thing in set(pair[1])))[0]


def _records(
    condition: str, ids: Sequence[str], references: Sequence[str], written: Sequence[Record]
) -> Iterator[Record]:
    for id, reference, result in zip(ids, references, written, strict=True):
        yield {"condition": condition, "id": id, "family": "all", "answer": reference, **result}


def _captions(model: Captioner, task: CaptionsTask, samples: list[Sample]) -> list[Record]:
    media = [part if isinstance(part := sample.views.get(task.media), Media) else None for sample in samples]
    found = model.caption(media, task.request, max_new_tokens=task.max_new_tokens)
    if len(found) != len(media):
        raise DataError(f"the model gave {len(found)} captions of {len(media)} media, expected as many")
    return [{"prediction": text} for text in found]
