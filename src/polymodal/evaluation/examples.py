"""Picks what a report shows: answered questions, mistakes, the commonest confusions, searches with their results."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.core.parts import Part
from polymodal.core.samples import Sample
from polymodal.evaluation.metrics import normalise
from polymodal.evaluation.scores import read_predictions
from polymodal.evaluation.tasks import TASKS, RetrievalTask, read_samples, split_answer


@dataclass(frozen=True, slots=True)
class QuestionExample:
    """One answered question: its parts in reading order, the right answer and the model's."""

    id: str
    family: str
    parts: tuple[Part, ...]
    answer: str
    prediction: str

    @property
    def is_right(self) -> bool:
        """Whether the two agree, normalised."""
        return normalise(self.answer) == normalise(self.prediction)


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often one wrong answer was given for another."""

    family: str
    answer: str
    prediction: str
    count: int


@dataclass(frozen=True, slots=True)
class Found:
    """One search result: the part, its cosine similarity, and whether it is right."""

    part: Part
    score: float
    is_right: bool


@dataclass(frozen=True, slots=True)
class RetrievalExample:
    """One search: from which to which modality, the query, and what came first."""

    direction: str
    query: Part
    results: tuple[Found, ...]


def question_examples(
    predictions: str | Path, *, per_family: int = 1, mistakes: int = 12, seed: int = 0
) -> tuple[list[QuestionExample], list[QuestionExample]]:
    """Questions drawn with the seed from a stored run: from each family, right or wrong as they come; and mistakes.

    Args:
        predictions: the file that ``evaluate`` wrote; its task says where the samples are.
        per_family: how many from each family, so that the examples are a fair draw.
        mistakes: how many wrong ones in addition, spread over the families.
        seed: of the draw.

    Raises:
        DataError: if a file cannot be read.
    """
    header, records = read_predictions(predictions)
    records = [record for record in records if record["condition"] == "full" and "error" not in record]
    order = np.random.default_rng(seed).permutation(len(records))
    by_family: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for i in order:
        by_family[records[i]["family"]].append(records[i])
    fair = [record for family in sorted(by_family) for record in by_family[family][:per_family]]
    shown = {record["id"] for record in fair}
    wrong = {
        family: [record for record in members if not _is_right(record) and record["id"] not in shown]
        for family, members in sorted(by_family.items())
    }
    spread = _in_turn(wrong.values(), mistakes)
    samples = _samples(header, {record["id"] for record in (*fair, *spread)})
    return [_example(record, samples) for record in fair], [_example(record, samples) for record in spread]


def confusions(predictions: str | Path, most: int = 12) -> list[Confusion]:
    """The commonest mistakes of a stored run, normalised, most frequent first.

    Raises:
        DataError: if the file cannot be read.
    """
    _, records = read_predictions(predictions)
    counts = Counter(
        (record["family"], normalise(record["answer"]), normalise(record["prediction"]))
        for record in records
        if record["condition"] == "full" and not _is_right(record)
    )
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Confusion(*names, count) for names, count in ordered[:most]]


def retrieval_examples(predictions: str | Path, *, num: int = 3, seed: int = 0) -> list[RetrievalExample]:
    """Searches of a stored retrieval run, drawn with the seed.

    Raises:
        DataError: if a file cannot be read.
    """
    header, records = read_predictions(predictions)
    task = TASKS.parse(header["task"])
    assert isinstance(task, RetrievalTask), "the caller chose a questions run"
    chosen = [records[i] for i in np.random.default_rng(seed).permutation(len(records))[:num]]
    samples = _samples(header, {record["id"] for record in chosen} | {h["id"] for r in chosen for h in r["top"]})
    return [
        RetrievalExample(
            f"{task.query} \u2192 {task.target}",
            samples[record["id"]].views[task.query],
            tuple(Found(samples[hit["id"]].views[task.target], hit["score"], hit["is_right"]) for hit in record["top"]),
        )
        for record in chosen
    ]


def _is_right(record: Mapping[str, Any]) -> bool:
    return normalise(record["answer"]) == normalise(record["prediction"])


def _in_turn(groups: Iterable[list[Mapping[str, Any]]], most: int) -> list[Mapping[str, Any]]:
    """The first of each group, then the second of each, and so on."""
    ranked = [(i, g, record) for g, group in enumerate(groups) for i, record in enumerate(group)]
    return [record for _, _, record in sorted(ranked, key=lambda entry: entry[:2])[:most]]


def _samples(header: Mapping[str, Any], ids: set[str]) -> dict[str, Sample]:
    return {sample.id: sample for sample in read_samples(header["task"]["data"]) if sample.id in ids}


def _example(record: Mapping[str, Any], samples: Mapping[str, Sample]) -> QuestionExample:
    question, _ = split_answer(samples[record["id"]])
    parts = tuple(part for message in question.messages for part in message.parts)
    return QuestionExample(record["id"], record["family"], parts, record["answer"], record["prediction"])
