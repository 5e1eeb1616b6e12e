"""Tasks: what is asked of a model, on which samples, under which conditions. ``TASKS`` lists them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from polymodal.core.config import Config, Table, unknown
from polymodal.core.errors import SampleError
from polymodal.core.parts import MODALITIES
from polymodal.core.samples import Sample
from polymodal.data.sources import open_source

CONDITIONS = ("full", "blind", "shuffled", "majority", "wording", "without")
"""Under what a question is answered: everything there; no media; the media of another question; the most frequent
answer of the family; that of the wording; each modality of a question that has several withheld."""


class TaskConfig(Config):
    """Base of the task configs.

    Args:
        name: what reports call the task; the file's name where it is empty.
        data: JSON Lines of samples.
        limit: at most so many questions per family (queries of a retrieval task), drawn with ``seed``; None for all.
        batch_size: how many are given to the model at once.
        seed: of the draw, the shuffles and the intervals.
    """

    name: str = ""
    data: str
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    seed: int = 0

    @property
    def title(self) -> str:
        """The name, or what the data file is called."""
        return self.name or Path(self.data).stem


class QuestionsTask(TaskConfig):
    """Questions with one right answer each.

    A sample is a conversation whose last turn, the assistant's, is the answer (or ``meta.answer`` is); ``meta.family``
    names the kind of question.

    Args:
        conditions: see :data:`CONDITIONS`; ``full`` is always there.
        control_limit: at most so many questions per family for the conditions other than ``full`` that ask the model.
        max_new_tokens: the longest answer.
    """

    use: Literal["questions"] = "questions"
    conditions: tuple[str, ...] = CONDITIONS
    control_limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)

    @field_validator("conditions")
    @classmethod
    def _known(cls, conditions: tuple[str, ...]) -> tuple[str, ...]:
        for condition in conditions:
            if condition not in CONDITIONS:
                raise ValueError(unknown("condition", condition, CONDITIONS))
        return tuple(name for name in CONDITIONS if name == "full" or name in conditions)


class RetrievalTask(TaskConfig):
    """Find the right views of one modality for views of another.

    Args:
        query: the modality searched with.
        target: the modality searched in.
        positives: ``sample``: only the view of the same thing is right; ``label``: every view of the same class is.
            A query never finds itself.
        ks: the K of each reported R@K; the first is the score.
    """

    use: Literal["retrieval"] = "retrieval"
    query: str
    target: str
    positives: Literal["sample", "label"] = "sample"
    ks: tuple[int, ...] = (1, 5, 10)

    @field_validator("query", "target")
    @classmethod
    def _modality(cls, modality: str) -> str:
        if modality not in MODALITIES:
            raise ValueError(unknown("modality", modality, MODALITIES))
        return modality

    @field_validator("ks")
    @classmethod
    def _some_ks(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if not ks or min(ks) < 1:
            raise ValueError("expected at least one K, each at least 1")
        return ks


TASKS: Table[TaskConfig] = Table("task", [QuestionsTask, RetrievalTask])
"""Every kind of task."""


def read_samples(path: str | Path) -> Iterator[Sample]:
    """The samples of a JSON Lines file (or of a data folder), in order.

    Raises:
        DataError: if the file cannot be read or is empty; SampleError if a line is not a sample.
    """
    source = open_source(path)
    return (source[i] for i in range(len(source)))


def family_of(sample: Sample) -> str:
    """``meta.family``, or ``all``."""
    return str(sample.meta.get("family", "all"))


def split_answer(sample: Sample) -> tuple[Sample, str]:
    """The question without its answer, and the answer: ``meta.answer``, else the text of the assistant's last turn.

    Raises:
        SampleError: if there is neither, or no question.
    """
    turns = sample.messages
    answer = sample.meta.get("answer")
    if turns and turns[-1].role == "assistant":
        answer = turns[-1].text if answer is None else answer
        turns = turns[:-1]
    if not turns or answer is None or not str(answer).strip():
        raise SampleError(
            sample.id, "expected a conversation that ends with the assistant's answer, or meta.answer, after a question"
        )
    return Sample(sample.id, turns, {}, sample.label, sample.meta), str(answer)


def limited(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """At most ``limit`` samples of each family, drawn with the seed; the order stays."""
    if limit is None:
        return samples
    places: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        places[family_of(sample)].append(i)
    rng = np.random.default_rng(seed)
    kept = {i for family in sorted(places) for i in rng.permutation(places[family])[:limit].tolist()}
    return [sample for i, sample in enumerate(samples) if i in kept]
