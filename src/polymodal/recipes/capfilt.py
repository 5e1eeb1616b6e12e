"""Captioning and filtering (CapFilt): a model writes captions for media, a model throws out texts that do not fit.

Source: BLIP, arXiv 2201.12086, section 3.3. Deviations: any medium, not images alone; the filter is the shared space of
a model, with a threshold calibrated on mismatched pairs of the same data, since such a model has no matching head.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import DataError, PolymodalError
from polymodal.core.parts import Media, Part, Text
from polymodal.core.samples import Message, Sample, sample_to_json
from polymodal.data.sources import open_source

Progress = Callable[[int, int], None]


class Captioner(Protocol):
    """What writes captions: a :class:`polymodal.recipes.model.Model` with a decoder."""

    def answer(self, samples: Sequence[Sample], max_new_tokens: int = 32) -> list[str]:
        """Greedy answers to conversations."""


class Filter(Protocol):
    """What judges pairs: a :class:`polymodal.recipes.model.Model` with a shared space."""

    def embed(self, parts: Sequence[Part | str], batch_size: int = 64) -> NDArray[np.float32]:
        """Unit vectors."""


@dataclass(frozen=True, slots=True)
class CapFiltReport:
    """What came of it.

    Args:
        num_samples: view sets read.
        num_written: pairs written; a sample may give none, one or two.
        kept: how many texts were kept, ``original`` and ``synthetic``.
        dropped: how many were thrown out.
        skipped: (sample, reason) of those that could not be used.
        threshold: the least similarity of a kept pair.
    """

    num_samples: int
    num_written: int
    kept: dict[str, int]
    dropped: dict[str, int]
    skipped: list[tuple[str, str]]
    threshold: float

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "samples": self.num_samples,
            "written": self.num_written,
            "kept": self.kept,
            "dropped": self.dropped,
            "skipped": [list(pair) for pair in self.skipped],
            "threshold": self.threshold,
        }


def capfilt(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    captioner: Captioner | None,
    judge: Filter,
    *,
    request: str = "Describe this image.",
    false_accept: float = 0.05,
    threshold: float | None = None,
    max_new_tokens: int = 96,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> CapFiltReport:
    """Caption, filter and write pairs of a medium and a text.

    Args:
        data: JSON Lines of view sets with one medium and a ``text``.
        out: the JSON Lines file to write; each line's ``meta`` says where its text is from and how similar the pair is.
        captioner: writes a second text for every medium; None only filters.
        judge: whose shared space measures whether a text fits.
        request: what the captioner is asked.
        false_accept: share of mismatched pairs that may pass; it sets the threshold.
        threshold: the least cosine similarity of a kept pair; None calibrates it by ``false_accept``.
        max_new_tokens: length of a written caption.
        batch_size: samples at a time.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: if no sample is usable, or ``out`` exists.
    """
    if not 0 < false_accept < 1:
        raise DataError(f"false_accept: found {false_accept}, expected a share between 0 and 1")
    target = Path(out)
    if target.exists():
        raise DataError(f"{target}: exists; choose another file")
    source = open_source(data)
    skipped: list[tuple[str, str]] = []
    pairs: list[_Pair] = []
    for start in range(0, len(source), batch_size):
        found = list(_usable((source[i] for i in range(start, min(start + batch_size, len(source)))), skipped))
        pairs += _judged(found, captioner, judge, request, max_new_tokens, batch_size, skipped)
        if progress is not None:
            progress(min(start + batch_size, len(source)), len(source))
    if not pairs:
        raise DataError(f"{data}: none of {len(source)} samples is a medium with a text; the first: {skipped[:1]}")
    least = _calibrate(pairs, false_accept) if threshold is None else threshold
    kept: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    partial = target.with_name(f".tmp-{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for pair in pairs:
            fits = pair.similarity >= least
            (kept if fits else dropped)[pair.origin] += 1
            if fits:
                file.write(json.dumps(sample_to_json(pair.written(), target.parent)) + "\n")
    partial.replace(target)
    return CapFiltReport(len(source), kept.total(), dict(kept), dict(dropped), skipped, least)


@dataclass(slots=True)
class _Pair:
    sample: Sample
    medium: Media
    text: str
    origin: str
    medium_D: NDArray[np.float32]
    text_D: NDArray[np.float32]

    @property
    def similarity(self) -> float:
        return float(self.medium_D @ self.text_D)

    def written(self) -> Sample:
        meta = {**self.sample.meta, "caption": self.origin, "similarity": round(self.similarity, 4)}
        views = {self.medium.modality: self.medium, "text": Text(self.text)}
        return Sample(f"{self.sample.id}-{self.origin}", views=views, meta=meta)


def _usable(samples: Iterator[Sample], skipped: list[tuple[str, str]]) -> Iterator[tuple[Sample, Media, str]]:
    for sample in samples:
        media = [part for name, part in sample.views.items() if name != "text" and isinstance(part, Media)]
        text = sample.views.get("text")
        if len(media) != 1 or not isinstance(text, Text):
            skipped.append((sample.id, f"has the views {sorted(sample.views)}, expected one medium and a text"))
            continue
        yield sample, media[0], text.text


def _judged(
    found: list[tuple[Sample, Media, str]],
    captioner: Captioner | None,
    judge: Filter,
    request: str,
    max_new_tokens: int,
    batch_size: int,
    skipped: list[tuple[str, str]],
) -> list[_Pair]:
    """Both texts of every medium with their vectors; a medium that cannot be read is skipped by name."""
    readable, vectors = _read(found, judge, batch_size, skipped)
    if not readable:
        return []
    texts = [(place, text, "original") for place, (_, _, text) in enumerate(readable)]
    if captioner is not None:
        prompts = [Sample(s.id, (Message("user", (medium, Text(request))),)) for s, medium, _ in readable]
        written = captioner.answer(prompts, max_new_tokens)
        texts += [(place, text, "synthetic") for place, text in enumerate(written) if text]
    text_vectors = judge.embed([text for _, text, _ in texts], batch_size)
    return [
        _Pair(readable[place][0], readable[place][1], text, origin, vectors[place], vector)
        for (place, text, origin), vector in zip(texts, text_vectors, strict=True)
    ]


def _read(
    found: list[tuple[Sample, Media, str]], judge: Filter, batch_size: int, skipped: list[tuple[str, str]]
) -> tuple[list[tuple[Sample, Media, str]], list[NDArray[np.float32]]]:
    """The samples whose medium can be read, and its vectors."""
    try:
        return found, list(judge.embed([medium for _, medium, _ in found], batch_size)) if found else []
    except PolymodalError:
        # One of them cannot be read: ask for each alone, to name it.
        readable: list[tuple[Sample, Media, str]] = []
        vectors: list[NDArray[np.float32]] = []
        for entry in found:
            try:
                vectors.append(judge.embed([entry[1]], batch_size)[0])
                readable.append(entry)
            except PolymodalError as error:
                skipped.append((entry[0].id, str(error)))
        return readable, vectors


def _calibrate(pairs: Sequence[_Pair], false_accept: float) -> float:
    """The similarity that this share of mismatched pairs reaches: every medium with another sample's original text."""
    originals = [pair for pair in pairs if pair.origin == "original"]
    if len(originals) < 2:
        raise DataError(f"found {len(originals)} pair(s), expected at least 2 to calibrate a threshold; give one")
    order = list(range(len(originals)))
    random.Random(0).shuffle(order)
    # Neighbours in a random order: no medium meets its own text.
    wrong = [
        float(originals[one].medium_D @ originals[other].text_D)
        for one, other in zip(order, order[1:] + order[:1], strict=True)
    ]
    return float(np.quantile(np.asarray(wrong), 1 - false_accept))
