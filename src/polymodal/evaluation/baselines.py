"""What a score has to be compared with: constant answers, other media, no media; and how a model is asked."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from polymodal.core.errors import ConfigError, DataError, PolymodalError
from polymodal.core.parts import MODALITIES, Media, Part
from polymodal.core.samples import Message, Sample
from polymodal.evaluation.metrics import normalise
from polymodal.evaluation.predictions import Predictions, Record

Ask = Callable[[list[Sample]], list[Record]]
Progress = Callable[[str, int, int], None]
"""Called as ``progress(condition, done, total)`` after every batch."""


def blind(sample: Sample) -> Sample:
    """The sample with all its media removed; its text stays."""
    return sample.without(*(modality for modality in MODALITIES if modality != "text"))


def conditions(
    asked: list[Sample], fewer: list[Sample], names: Sequence[str], seed: int
) -> Iterator[tuple[str, list[Sample]]]:
    """The conditions that ask the model, with what they ask.

    Args:
        asked: everything.
        fewer: those of it that are asked again.
        names: ``blind``, ``shuffled``, ``without``, or some of them; ``full`` is always there.
        seed: of the shuffle.
    """
    yield "full", asked
    if "blind" in names:
        yield "blind", [blind(sample) for sample in fewer if sample.media()]
    if "shuffled" in names:
        # Media come from all that is asked, so that a small control still finds a donor.
        kept = {sample.id for sample in fewer}
        shuffled = shuffle_media(asked, seed=seed)
        yield "shuffled", [sample for sample in shuffled if sample is not None and sample.id in kept]
    if "without" in names:
        several = [(sample, {part.modality for part in sample.media()}) for sample in fewer]
        for modality in sorted({name for _, present in several if len(present) > 1 for name in present}):
            less = [sample.without(modality) for sample, there in several if len(there) > 1 and modality in there]
            yield f"without_{modality}", less


def asked(
    conditions: Iterable[tuple[str, list[Sample]]],
    ask: Ask,
    batch_size: int,
    stored: Predictions,
    progress: Progress,
) -> Iterator[tuple[str, Sample, Record]]:
    """Condition, sample and result of everything that is asked; batches that are stored are not asked again.

    Args:
        conditions: what is asked under each.
        ask: gives a result for each sample of a batch.
        batch_size: samples at a time.
        stored: records of an interrupted evaluation, each of which holds its result.
        progress: called after every batch.
    """
    for condition, samples in conditions:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            results = stored.of(condition, batch) or tried(ask, batch)
            yield from ((condition, sample, result) for sample, result in zip(batch, results, strict=True))
            progress(condition, start + len(batch), len(samples))


def tried(ask: Ask, batch: list[Sample]) -> list[Record]:
    """What the model gives for each sample, with its ``seconds``; ``error`` alone where it cannot.

    A batch that fails is asked again one by one, so that the bad sample is named.

    Raises:
        ConfigError: if the model cannot do what is asked at all; DataError if what it gives is malformed.
    """
    began = time.perf_counter()
    try:
        found = ask(batch)
    except (ConfigError, DataError):
        raise
    except PolymodalError as error:
        if len(batch) == 1:
            return [{"error": str(error)}]
        return [tried(ask, [sample])[0] for sample in batch]
    seconds = round((time.perf_counter() - began) / len(batch), 6)
    return [{**result, "seconds": seconds} for result in found]


def majority(families: Sequence[str], answers: Sequence[str]) -> list[str]:
    """For each question the most frequent answer of its family: the best constant answer there is.

    It is taken from the very answers that are scored, so that it is an upper bound for any constant.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for family, answer in zip(families, answers, strict=True):
        counts[family][normalise(answer)] += 1
    best = {family: _most_frequent(counter) for family, counter in counts.items()}
    return [best[family] for family in families]


def wording_majority(
    families: Sequence[str], wordings: Sequence[str], answers: Sequence[str], *, seed: int = 0
) -> list[str]:
    """For each question the most frequent answer to the same wording: what the words alone give away.

    Wordings may be rare, so the answer is learned on one half of the questions and given on the other, and the other
    way round; a wording that the other half lacks gets the majority of its family there.
    """
    half = np.random.default_rng(seed).permutation(len(answers)) % 2
    counts: dict[tuple[int, str, str | None], Counter[str]] = defaultdict(Counter)
    for i, (family, wording, answer) in enumerate(zip(families, wordings, answers, strict=True)):
        counts[int(half[i]), family, wording][normalise(answer)] += 1
        counts[int(half[i]), family, None][normalise(answer)] += 1
    result = []
    for i, (family, wording) in enumerate(zip(families, wordings, strict=True)):
        other = 1 - int(half[i])
        counter = counts.get((other, family, wording)) or counts.get((other, family, None)) or Counter({"": 1})
        result.append(_most_frequent(counter))
    return result


def shuffle_media(samples: Sequence[Sample], *, seed: int = 0) -> list[Sample | None]:
    """Each question with the media of another one of the same family and the same modalities, in order.

    Questions about the same media keep sharing media, and nobody keeps their own: the distinct media of a group are
    permuted along one random cycle. None where a group has a single set of media, or a question has none.

    Worked example: questions 1 and 2 about photo A, 3 about B, 4 about C. A cycle A -> C -> B -> A gives photo C to 1
    and 2, A to 3, B to 4.
    """
    groups: dict[tuple[object, ...], dict[tuple[str, ...], tuple[Media, ...]]] = defaultdict(dict)
    places = []
    for sample in samples:
        media = sample.media()
        group: tuple[object, ...] = (str(sample.meta.get("family", "")), tuple(part.modality for part in media))
        key = tuple(_identity(part) for part in media)
        groups[group].setdefault(key, media)
        places.append((group, key))
    rng = np.random.default_rng(seed)
    donor: dict[tuple[object, ...], tuple[Media, ...]] = {}
    for group, sets in groups.items():
        keys = list(sets)
        if len(keys) < 2:
            continue
        cycle = rng.permutation(len(keys))
        for here, there in zip(cycle, np.roll(cycle, 1), strict=True):
            donor[group, keys[here]] = sets[keys[there]]
    return [
        _with_media(sample, donor[place]) if place in donor else None
        for sample, place in zip(samples, places, strict=True)
    ]


def _with_media(sample: Sample, media: tuple[Media, ...]) -> Sample:
    fresh = iter(media)
    messages = tuple(
        Message(message.role, tuple(next(fresh) if isinstance(part, Media) else part for part in message.parts))
        for message in sample.messages
    )
    views: dict[str, Part] = {
        name: next(fresh) if isinstance(part, Media) else part for name, part in sample.views.items()
    }
    return Sample(sample.id, messages, views, sample.label, sample.meta)


def _identity(part: Media) -> str:
    """Equal for the same file or the same content in memory."""
    return part.modality + ":" + (str(part.path) if part.path is not None else part.content_key())


def _most_frequent(counter: Counter[str]) -> str:
    # Ties go to the first in a fixed pseudo-random order: alphabetical order would favour "no" over "yes" everywhere.
    return min(counter, key=lambda answer: (-counter[answer], hashlib.blake2b(answer.encode()).digest()))
