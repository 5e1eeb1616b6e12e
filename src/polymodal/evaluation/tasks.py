"""Tasks: what is asked of a model, on which samples, under which conditions. ``TASKS`` lists them."""

from __future__ import annotations

from abc import ABC
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from polymodal.core.config import Config, Table, unknown
from polymodal.core.errors import SampleError
from polymodal.core.parts import MODALITIES
from polymodal.core.samples import Sample
from polymodal.data.sources import open_source
from polymodal.evaluation.caption_scores import fact_pattern
from polymodal.evaluation.words import ENGLISH

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
        families: the kinds of questions that are asked, of a model that takes some modalities alone; empty for all.
        control_limit: at most so many questions per family for the conditions other than ``full`` that ask the model.
        max_new_tokens: the longest answer.
    """

    use: Literal["questions"] = "questions"
    families: tuple[str, ...] = ()
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
        rerank: put the first so many candidates into the order of the model's ``matching`` head (ALBEF, arXiv
            2107.07651, section 4.2; its top 128 or 256); 0: the order of the shared space stays.
    """

    use: Literal["retrieval"] = "retrieval"
    query: str
    target: str
    positives: Literal["sample", "label"] = "sample"
    ks: tuple[int, ...] = (1, 5, 10)
    rerank: int = Field(default=0, ge=0)

    @field_validator("query", "target")
    @classmethod
    def _modality(cls, modality: str) -> str:
        if modality not in MODALITIES:
            raise ValueError(unknown("modality", modality, MODALITIES))
        return modality

    @model_validator(mode="after")
    def _two_views(self) -> Self:
        if self.rerank and self.query == self.target:
            raise ValueError(f"rerank: a matching head compares two views, found {self.query!r} on both sides")
        return self

    @field_validator("ks")
    @classmethod
    def _some_ks(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if not ks or min(ks) < 1:
            raise ValueError("expected at least one K, each at least 1")
        return ks


class FactsTask(TaskConfig, ABC):
    """Base of the tasks that ask about the facts which a text states of a medium; samples are view sets.

    A word counts where it stands once in its text. Without the medium (``blind``) the sample holds its text alone,
    which every backbone with a ``matching`` or ``masked_token`` head takes; nothing stands in for the medium.

    Args:
        media: the view that the text is about; samples without it, or without a text, are passed over.
        groups: group of facts -> its words or phrases; English colours, numbers, sizes and places where it is left out.
        conditions: what is measured beside ``full``: ``blind``, ``shuffled`` and ``majority``.
    """

    media: str = "image"
    groups: dict[str, tuple[str, ...]] = Field(default_factory=lambda: {n: tuple(w) for n, w in ENGLISH.items()})
    conditions: tuple[Literal["blind", "shuffled", "majority"], ...] = ("blind", "shuffled", "majority")

    @field_validator("groups")
    @classmethod
    def _some_choice(cls, groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, words in groups.items():
            if len({word.lower() for word in words if word.strip()}) < max(2, len(words)):
                raise ValueError(f"groups.{name}: found {list(words)}, expected two different words or more")
            if name in ("random", "overall"):
                raise ValueError(f"groups.{name}: the name has a meaning of its own in reports; choose another")
        return groups


class MatchingTask(FactsTask):
    """Is this text about this picture? Each medium stands with its own text, and with a foil: chance is one half.

    Answers are those of the model's ``matching`` head, yes from a threshold on: heads that learned from hard negatives
    say no too often at 0.5. Each half of the pairs is judged by the threshold that separates the other half best. A
    report has a row for the foils ``random`` and one for each group of ``minimal`` foils, with the accuracy at 0.5, the
    area under the ROC curve and the share of pairs in which the own text gets more than the foil.

    Args:
        foils: ``random``: the text of another sample, whose text and label differ; ``minimal``: the own text with one
            word changed for another of its group, which the text does not hold otherwise.
    """

    use: Literal["matching"] = "matching"
    foils: tuple[Literal["random", "minimal"], ...] = ("random", "minimal")

    @field_validator("foils")
    @classmethod
    def _some_foils(cls, foils: tuple[str, ...]) -> tuple[str, ...]:
        if not foils or len(set(foils)) < len(foils):
            raise ValueError(f"found {list(foils)}, expected random, minimal, or both once")
        return foils


class MaskedWordsTask(FactsTask):
    """What is the hidden word? Every token of one word is hidden at a time; right is the word itself.

    Args:
        head: the ``masked_token`` head that answers; empty: the only one that reads texts at the backbone.
    """

    use: Literal["masked_words"] = "masked_words"
    head: str = ""


class CaptionsTask(TaskConfig):
    """What does the model write about a medium? Its captions are put beside the texts of view sets.

    A report has a row for each group of facts, over all things told of, and BLEU-4 and CIDEr over all captions. The
    control ``shuffled`` is the caption of another sample's medium, ``blind`` what is written without any, and
    ``majority`` the same caption for all: the reference that the most samples share the most things with.

    Args:
        media: the view that is described; samples without it, or without a text, are passed over.
        facts: regular expression that matches once for each thing that a caption tells of, a named group for each fact;
            the first group says which thing it is. Captions are in lower case.
        request: what a model that chats is asked; models that only write captions are asked nothing.
        conditions: what is measured beside ``full``: ``blind``, ``shuffled`` and ``majority``.
        max_new_tokens: the longest caption.
    """

    use: Literal["captions"] = "captions"
    media: str = "image"
    facts: str
    request: str = "Describe this image."
    conditions: tuple[Literal["blind", "shuffled", "majority"], ...] = ("blind", "shuffled", "majority")
    max_new_tokens: int = Field(default=96, ge=1)

    @field_validator("facts")
    @classmethod
    def _names_facts(cls, facts: str) -> str:
        fact_pattern(facts)
        return facts


TASKS: Table[TaskConfig] = Table("task", [QuestionsTask, RetrievalTask, MatchingTask, MaskedWordsTask, CaptionsTask])
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
