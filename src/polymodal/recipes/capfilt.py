"""Captioning and filtering (CapFilt): a model writes captions for media, a model throws out texts that do not fit.

Source: BLIP, arXiv 2201.12086, section 3.3: captions are drawn from the nucleus, and a text, written or found, goes if
the matching head says that it does not fit. Here any medium may stand in the place of the image; a filter without a
matching head judges by its shared space, with a threshold from mismatched pairs of the same data.
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
from polymodal.core.samples import Sample, sample_to_json
from polymodal.data.sources import open_source
from polymodal.inference.sampling import Sampling
from polymodal.recipes.model import CAPTION_REQUEST

Progress = Callable[[int, int], None]
Pair = tuple[Media, str]

FALSE_ACCEPT = 0.05
"""Share of mismatched pairs that a shared space lets pass unless told otherwise."""
EVEN = 0.5
"""From this chance on a matching head says that a pair fits."""


class Captioner(Protocol):
    """What writes captions: a :class:`polymodal.recipes.model.Model` that chats or captions."""

    def caption(self, media: Sequence[Media | None], request: str, sampling: Sampling) -> list[str]:
        """A caption of each medium."""


class Filter(Protocol):
    """What judges pairs: a :class:`polymodal.recipes.model.Model` with a matching head or a shared space."""

    @property
    def can_match(self) -> bool:
        """Whether it has a matching head; else it has a shared space."""

    def match(self, samples: Sequence[Sample], batch_size: int = 256) -> NDArray[np.float32]:
        """The chance that the parts of each view set belong together."""

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
        judged_by: ``matching`` (chances that a pair fits) or ``similarity`` (cosines in the shared space).
        threshold: the least score of a kept pair.
    """

    num_samples: int
    num_written: int
    kept: dict[str, int]
    dropped: dict[str, int]
    skipped: list[tuple[str, str]]
    judged_by: str
    threshold: float

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "samples": self.num_samples,
            "written": self.num_written,
            "kept": self.kept,
            "dropped": self.dropped,
            "skipped": [list(pair) for pair in self.skipped],
            "judged_by": self.judged_by,
            "threshold": self.threshold,
        }


def capfilt(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    captioner: Captioner | None,
    judge: Filter,
    *,
    request: str = CAPTION_REQUEST,
    sampling: Sampling | None = None,
    false_accept: float | None = None,
    threshold: float | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> CapFiltReport:
    """Caption, filter and write pairs of a medium and a text.

    Args:
        data: JSON Lines of view sets with one medium and a ``text``.
        out: the JSON Lines file to write; each line's ``meta`` says where its text is from (``caption``) and how well
            the filter thinks it fits (``fit``).
        captioner: writes a second text for every medium; None only filters.
        judge: whose matching head, or else shared space, says whether a text fits.
        request: what a captioner that chats is asked.
        sampling: how captions are drawn; None is greedy, of at most 96 tokens. The paper draws from the nucleus
            (``top_p: 0.9, temperature: 1``): more varied captions, more of them wrong, and the filter to see to that.
        false_accept: share of mismatched pairs that may pass; it sets the threshold.
        threshold: the least score of a kept pair. Without it and ``false_accept``, a matching head decides by itself
            (0.5), and a shared space lets 5 % of the mismatched pairs pass.
        batch_size: samples at a time.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: if no sample is usable, or ``out`` exists.
    """
    if false_accept is not None and not 0 < false_accept < 1:
        raise DataError(f"false_accept: found {false_accept}, expected a share between 0 and 1")
    if false_accept is not None and threshold is not None:
        raise DataError("found both false_accept and threshold, expected one of them")
    target = Path(out)
    if target.exists():
        raise DataError(f"{target}: exists; choose another file")
    source = open_source(data)
    filter_ = _MatchingFilter(judge, batch_size) if judge.can_match else _SimilarityFilter(judge, batch_size)
    drawn = sampling or Sampling(max_new_tokens=96)
    skipped: list[tuple[str, str]] = []
    told: list[_Told] = []
    for start in range(0, len(source), batch_size):
        found = list(_usable((source[i] for i in range(start, min(start + batch_size, len(source)))), skipped))
        readable = _readable(found, filter_, skipped)
        texts = [_Told(*entry, "original", fit) for entry, fit in readable]
        if captioner is not None and texts:
            texts += _written(captioner, filter_, texts, request, drawn)
        told += texts
        if progress is not None:
            progress(min(start + batch_size, len(source)), len(source))
    if not told:
        raise DataError(f"{data}: none of {len(source)} samples is a medium with a text; the first: {skipped[:1]}")
    if threshold is None:
        threshold = EVEN
        if false_accept is not None or not judge.can_match:
            threshold = _calibrate(told, filter_, false_accept or FALSE_ACCEPT)
    kept, dropped = _write(told, target, threshold)
    return CapFiltReport(len(source), kept.total(), dict(kept), dict(dropped), skipped, filter_.name, threshold)


@dataclass(frozen=True, slots=True)
class _Told:
    """A text told of a medium, and how well it fits."""

    sample: Sample
    medium: Media
    text: str
    origin: str
    fit: float

    def written(self) -> Sample:
        meta = {**self.sample.meta, "caption": self.origin, "fit": round(self.fit, 4)}
        views = {self.medium.modality: self.medium, "text": Text(self.text)}
        # The label told of the facts of the text that was found; what a written one tells is not known.
        label = self.sample.label if self.origin == "original" else None
        return Sample(f"{self.sample.id}-{self.origin}", views=views, label=label, meta=meta)


class _MatchingFilter:
    name = "matching"

    def __init__(self, judge: Filter, batch_size: int) -> None:
        self.judge, self.batch_size = judge, batch_size

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """How well each pair fits."""
        views = [{medium.modality: medium, "text": Text(text)} for medium, text in pairs]
        samples = [Sample(f"pair {place}", views=there) for place, there in enumerate(views)]
        return [float(chance) for chance in self.judge.match(samples, self.batch_size)]


class _SimilarityFilter:
    name = "similarity"

    def __init__(self, judge: Filter, batch_size: int) -> None:
        self.judge, self.batch_size = judge, batch_size

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """How well each pair fits."""
        media_ND = self.judge.embed([medium for medium, _ in pairs], self.batch_size)
        texts_ND = self.judge.embed([text for _, text in pairs], self.batch_size)
        # Of a medium with several vectors the best counts.
        return [float(np.max(x_D @ y_D)) for x_D, y_D in zip(media_ND, texts_ND, strict=True)]


_Judge = _MatchingFilter | _SimilarityFilter
_Found = tuple[Sample, Media, str]


def _usable(samples: Iterator[Sample], skipped: list[tuple[str, str]]) -> Iterator[_Found]:
    for sample in samples:
        media = [part for name, part in sample.views.items() if name != "text" and isinstance(part, Media)]
        text = sample.views.get("text")
        if len(media) != 1 or not isinstance(text, Text):
            skipped.append((sample.id, f"has the views {sorted(sample.views)}, expected one medium and a text"))
            continue
        yield sample, media[0], text.text


def _readable(found: list[_Found], filter_: _Judge, skipped: list[tuple[str, str]]) -> list[tuple[_Found, float]]:
    """The samples that can be read, and how well their own texts fit; the others are skipped by name."""
    if not found:
        return []
    try:
        fits = filter_([(medium, text) for _, medium, text in found])
        return list(zip(found, fits, strict=True))
    except PolymodalError as error:
        if len(found) == 1:
            skipped.append((found[0][0].id, str(error)))
            return []
        # One of them cannot be read: ask for each alone, to name it.
        return [pair for entry in found for pair in _readable([entry], filter_, skipped)]


def _written(
    captioner: Captioner, filter_: _Judge, texts: Sequence[_Told], request: str, sampling: Sampling
) -> list[_Told]:
    """Captions of the same media; one that is empty is none."""
    captions = captioner.caption([told.medium for told in texts], request, sampling)
    there = [(told, caption) for told, caption in zip(texts, captions, strict=True) if caption]
    fits = filter_([(told.medium, caption) for told, caption in there]) if there else []
    return [
        _Told(told.sample, told.medium, caption, "synthetic", fit)
        for (told, caption), fit in zip(there, fits, strict=True)
    ]


def _calibrate(told: Sequence[_Told], filter_: _Judge, false_accept: float) -> float:
    """The score that this share of mismatched pairs reaches: every medium with another sample's original text."""
    originals = [entry for entry in told if entry.origin == "original"]
    if len(originals) < 2:
        raise DataError(f"found {len(originals)} pair(s), expected at least 2 to calibrate a threshold; give one")
    random.Random(0).shuffle(originals)
    # Neighbours in a random order: no medium meets its own text.
    neighbours = zip(originals, originals[1:] + originals[:1], strict=True)
    wrong = filter_([(one.medium, other.text) for one, other in neighbours])
    return float(np.quantile(np.asarray(wrong), 1 - false_accept))


def _write(told: Sequence[_Told], target: Path, threshold: float) -> tuple[Counter[str], Counter[str]]:
    """Write what fits; how many texts of each origin were kept and dropped."""
    kept: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    partial = target.with_name(f".tmp-{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for entry in told:
            fits = entry.fit >= threshold
            (kept if fits else dropped)[entry.origin] += 1
            if fits:
                file.write(json.dumps(sample_to_json(entry.written(), target.parent)) + "\n")
    partial.replace(target)
    return kept, dropped
