"""Asks about the facts that texts state of media: does the text belong to the medium, which word is hidden in it?

A sample of such a task is a view set of two: the medium and its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from polymodal.core.errors import DataError
from polymodal.core.parts import Text
from polymodal.core.samples import Sample
from polymodal.data.selection import described
from polymodal.evaluation import baselines
from polymodal.evaluation.baselines import Ask, Progress
from polymodal.evaluation.predictions import Predictions, Record
from polymodal.evaluation.tasks import FactsTask, MaskedWordsTask, MatchingTask, family_of, limited, read_samples
from polymodal.evaluation.words import change_fact, find_facts

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TEXT = "text"
_FOIL = "foil"
_TRIES = 50
"""Samples looked at for a text that is not the own one; data of few different texts may offer none."""


class Reader(Protocol):
    """What these tasks ask of a model."""

    def match(self, samples: list[Sample]) -> NDArray[np.float32]:
        """The chance that the parts of each view set belong together, ``[N]``."""

    def fill(self, samples: list[Sample], hidden: list[tuple[int, int]], head: str = "") -> list[str]:
        """What stands in each text at the hidden characters ``[start, end)``, from the rest of the view set."""


def ask_pairs(model: Reader, task: MatchingTask, stored: Predictions, progress: Progress) -> Iterator[dict[str, Any]]:
    """A record per pair and condition: the chances that the model gives the own text and the foil.

    Raises:
        DataError: if the data cannot be read or no foil can be made.
    """
    described = _described(task)
    rng = np.random.default_rng(task.seed)
    pairs = [pair for sample in described for pair in _foils(sample, described, task, rng)]
    if not pairs:
        raise DataError(f"{task.data}: no foil could be made of its {len(described)} texts; {_hint(task)}")

    def chances(batch: list[Sample]) -> list[dict[str, Any]]:
        foils = [_with_text(sample, str(sample.meta[_FOIL])) for sample in batch]
        found = np.asarray(model.match([*batch, *foils]), dtype=np.float64)
        if found.shape != (2 * len(batch),) or not np.all((found >= 0) & (found <= 1)):
            raise DataError(f"the model gave {found.shape} values for {2 * len(batch)} view sets, expected chances")
        return [{"own": float(own), _FOIL: float(foil)} for own, foil in found.round(6).reshape(2, -1).T]

    for condition, sample, result in _asked(task, pairs, chances, stored, progress):
        yield {
            "condition": condition, "id": sample.id, "family": family_of(sample), "text": _text(sample),
            "foil_text": sample.meta[_FOIL], **({"own": 0.0, _FOIL: 1.0} | result),
        }  # fmt: skip


def ask_words(
    model: Reader, task: MaskedWordsTask, stored: Predictions, progress: Progress
) -> Iterator[dict[str, Any]]:
    """A record per hidden word and condition: what the model puts there.

    Raises:
        DataError: if the data cannot be read or holds none of the words.
    """
    hidden: dict[str, tuple[int, int]] = {}
    asked = []
    for sample in _described(task):
        for fact in find_facts(_text(sample), task.groups):
            id = f"{sample.id}@{fact.start}"
            hidden[id] = (fact.start, fact.end)
            asked.append(Sample(id, views=sample.views, meta={"family": fact.group, "answer": fact.word}))
    if not asked:
        raise DataError(f"{task.data}: its texts hold no word that could be hidden; {_hint(task)}")
    asked = limited(asked, task.limit, task.seed)

    def words(batch: list[Sample]) -> list[dict[str, Any]]:
        found = model.fill(batch, [hidden[sample.id] for sample in batch], task.head)
        if len(found) != len(batch):
            raise DataError(f"the model gave {len(found)} words for {len(batch)} hidden ones, expected as many")
        return [{"prediction": word} for word in found]

    def record(condition: str, sample: Sample, result: dict[str, Any]) -> dict[str, Any]:
        (start, end), text = hidden[sample.id], _text(sample)
        return {
            "condition": condition, "id": sample.id, "family": family_of(sample),
            "question": f"{text[:start]}[...]{text[end:]}", "answer": sample.meta["answer"],
            **({"prediction": ""} | result),
        }  # fmt: skip

    for condition, sample, result in _asked(task, asked, words, stored, progress):
        yield record(condition, sample, result)
    if "majority" in task.conditions:
        families, answers = [family_of(s) for s in asked], [str(s.meta["answer"]) for s in asked]
        for sample, constant in zip(asked, baselines.majority(families, answers), strict=True):
            yield record("majority", sample, {"prediction": constant})


def _hint(task: FactsTask) -> str:
    return f"expected some that hold a word of 'groups' exactly once, of {', '.join(task.groups) or 'no group at all'}"


def _described(task: FactsTask) -> list[Sample]:
    """The medium and the text of every sample that has both, and nothing else."""
    samples = [described(sample) for sample in read_samples(task.data)]
    found = [
        Sample(sample.id, views={name: sample.views[name] for name in (task.media, _TEXT)}, label=sample.label)
        for sample in samples
        if task.media in sample.views and isinstance(sample.views.get(_TEXT), Text)
    ]
    if not found:
        raise DataError(f"{task.data}: none of {len(samples)} samples has the views {task.media!r} and 'text'")
    if len({sample.id for sample in found}) < len(found):
        raise DataError(f"{task.data}: samples share ids; make them unique")
    return found


def _text(sample: Sample) -> str:
    part = sample.views[_TEXT]
    assert isinstance(part, Text)
    return part.text


def _with_text(sample: Sample, text: str) -> Sample:
    return Sample(sample.id, views={**sample.views, _TEXT: Text(text)}, meta=sample.meta)


def _foils(sample: Sample, others: Sequence[Sample], task: MatchingTask, rng: np.random.Generator) -> Iterator[Sample]:
    """The sample once for each kind of foil that it has, which ``meta`` holds."""
    text, made = _text(sample), dict[str, str]()
    if "random" in task.foils:
        is_label = sample.label is not None
        for place in rng.permutation(len(others))[:_TRIES]:
            other = others[int(place)]
            if _text(other) != text and not (is_label and other.label == sample.label):
                made["random"] = _text(other)
                break
    if "minimal" in task.foils:
        facts = find_facts(text, task.groups)
        for group, words in task.groups.items():
            own = [fact for fact in facts if fact.group == group]
            changed = change_fact(text, own[int(rng.integers(len(own)))], words, rng) if own else None
            if changed is not None:
                made[group] = changed
    for family, foil in made.items():
        yield Sample(f"{sample.id}@{family}", views=sample.views, meta={"family": family, _FOIL: foil})


def _asked(
    task: FactsTask, samples: list[Sample], ask: Ask, stored: Predictions, progress: Progress
) -> Iterator[tuple[str, Sample, Record]]:
    """What came back for every sample under every condition that asks the model."""
    samples = limited(samples, task.limit, task.seed)
    conditions = baselines.conditions(samples, samples, task.conditions, task.seed)
    return baselines.asked(conditions, ask, task.batch_size, stored, progress)
