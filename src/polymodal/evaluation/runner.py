"""Runs a task on a model: asks every question under every condition, stores what came back, and scores it.

The model is anything that answers and embeds; this package imports none. Scores come from the stored records alone
(``evaluation.scores``), so that :func:`polymodal.evaluation.scores.rescore` gives the same report later.

Shape legend: ``Q`` queries, ``N`` candidates, ``D`` width of an embedding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from polymodal.core.errors import DataError, MediaError
from polymodal.core.parts import Part
from polymodal.core.samples import Sample
from polymodal.data.sources import open_source
from polymodal.evaluation import baselines
from polymodal.evaluation.baselines import Progress
from polymodal.evaluation.captioning import Captioner, write_all
from polymodal.evaluation.facts import Reader, ask_pairs, ask_words
from polymodal.evaluation.metrics import first_positive_ranks
from polymodal.evaluation.predictions import Predictions, Record
from polymodal.evaluation.scores import FORMAT, Report, score
from polymodal.evaluation.tasks import (
    CaptionsTask,
    MaskedWordsTask,
    MatchingTask,
    QuestionsTask,
    RetrievalTask,
    TaskConfig,
    family_of,
    limited,
    read_samples,
    split_answer,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TOP = 5
_QUERY_BLOCK = 512


class Model(Reader, Captioner, Protocol):
    """What evaluation asks of a model."""

    def answer(self, samples: list[Sample], max_new_tokens: int) -> list[str]:
        """The answer to each conversation, drawn greedily; one per sample, in order."""

    def embed(self, parts: list[Part]) -> NDArray[np.float32]:
        """``[N, D]`` float32 of unit length, one row per part, in order; or ``[N, M, D]``, of which the best counts."""


def evaluate(
    model: Model,
    task: TaskConfig,
    *,
    conditions: Sequence[str] | None = None,
    predictions: str | Path | None = None,
    progress: Progress | None = None,
    fingerprint: str | None = None,
) -> Report:
    """Measure a model on a task.

    Args:
        model: what is measured.
        task: an entry of ``TASKS``.
        conditions: replaces those of a questions task.
        predictions: a file for the stored predictions; written line by line, beside it until all are there.
        progress: called after every batch.
        fingerprint: tells the model from others; with it, an interrupted evaluation goes on after the last batch that
            it stored (a search begins again).

    Raises:
        DataError: if the data cannot be read or holds nothing to ask, or the model returns something malformed.
        SampleError: if a question has no answer to compare with.
    """
    if isinstance(task, QuestionsTask) and conditions is not None:
        task = QuestionsTask.parse({**task.to_data(), "conditions": tuple(conditions)}, "task")
    header: dict[str, Any] = {"polymodal_predictions": FORMAT, "title": task.title, "task": task.to_data()}
    header |= {"data": open_source(task.data).fingerprint, "model": fingerprint}
    report_progress = progress or (lambda condition, done, total: None)
    found: list[Record] = []
    if isinstance(task, RetrievalTask):
        found, header["skipped"], header["errors"] = _retrieve_all(model, task, report_progress)
    path = None if predictions is None else Path(predictions)
    with Predictions(path, header, resumes=fingerprint is not None) as stored:
        return score(header, stored.keep(found or _records(model, task, stored, report_progress)))


def _records(model: Model, task: TaskConfig, stored: Predictions, progress: Progress) -> Iterator[Record]:
    """The records of a task whose samples are asked one by one."""
    if isinstance(task, QuestionsTask):
        return _ask_all(model, task, stored, progress)
    if isinstance(task, MatchingTask):
        return ask_pairs(model, task, stored, progress)
    if isinstance(task, MaskedWordsTask):
        return ask_words(model, task, stored, progress)
    if isinstance(task, CaptionsTask):
        return write_all(model, task, stored, progress)
    raise DataError(f"found a {type(task).__name__}, expected an entry of TASKS")


def _ask_all(model: Model, task: QuestionsTask, stored: Predictions, progress: Progress) -> Iterator[Record]:
    found = [sample for sample in read_samples(task.data) if not task.families or family_of(sample) in task.families]
    absent = sorted({*task.families} - {family_of(sample) for sample in found})
    if absent:
        raise DataError(f"{task.data}: has no questions of the family {absent[0]!r}; expected some of each: families")
    samples = limited(found, task.limit, task.seed)
    pairs = [split_answer(sample) for sample in samples]
    questions, answers = [question for question, _ in pairs], {question.id: answer for question, answer in pairs}
    if len(answers) < len(questions):
        raise DataError(
            f"{task.data}: {len(questions) - len(answers)} samples share an id with another; make ids unique"
        )
    fewer = limited(questions, task.control_limit, task.seed)
    ask = partial(_answers, model, max_new_tokens=task.max_new_tokens)
    conditions = baselines.conditions(questions, fewer, task.conditions, task.seed)
    for condition, sample, result in baselines.asked(conditions, ask, task.batch_size, stored, progress):
        yield _record(condition, sample, answers[sample.id], {"prediction": "", **result})
    yield from _constant_answers(questions, list(answers.values()), task)


def _constant_answers(questions: list[Sample], answers: list[str], task: QuestionsTask) -> Iterator[dict[str, Any]]:
    families = [family_of(sample) for sample in questions]
    wordings = [" / ".join(message.text for message in sample.messages) for sample in questions]
    constants = {
        "majority": baselines.majority(families, answers),
        "wording": baselines.wording_majority(families, wordings, answers, seed=task.seed),
    }
    for condition, predictions in constants.items():
        if condition in task.conditions:
            for sample, answer, prediction in zip(questions, answers, predictions, strict=True):
                yield _record(condition, sample, answer, {"prediction": prediction})


def _record(condition: str, sample: Sample, answer: str, result: dict[str, Any]) -> dict[str, Any]:
    question = sample.messages[-1].text
    return {
        "condition": condition, "id": sample.id, "family": family_of(sample), "question": question, "answer": answer,
        **result,
    }  # fmt: skip


def _answers(model: Model, samples: list[Sample], max_new_tokens: int) -> list[dict[str, Any]]:
    """One prediction per sample."""
    answers = model.answer(samples, max_new_tokens)
    if len(answers) != len(samples):
        raise DataError(f"the model gave {len(answers)} answers to {len(samples)} questions, expected as many")
    return [{"prediction": answer} for answer in answers]


def _retrieve_all(
    model: Model, task: RetrievalTask, progress: Progress
) -> tuple[list[dict[str, Any]], int, list[dict[str, str]]]:
    """The record of each query, how many queries have nothing right to find, and what could not be embedded."""
    began = time.perf_counter()
    samples = list(read_samples(task.data))
    if task.limit is not None and task.limit < len(samples):
        kept = np.sort(np.random.default_rng(task.seed).permutation(len(samples))[: task.limit])
        samples = [samples[i] for i in kept]
    target_ND, candidates, errors = _embed(model, samples, task.target, task.batch_size, progress)
    query_QD, queries = target_ND, candidates
    if task.query != task.target:
        query_QD, queries, failed = _embed(model, samples, task.query, task.batch_size, progress)
        errors += failed
    is_other_QN = np.ones((len(queries), len(candidates)), dtype=bool)
    if task.query == task.target:
        np.fill_diagonal(is_other_QN, False)
    is_positive_QN = _matches(queries, candidates, task.positives) & is_other_QN
    asked = np.flatnonzero(is_positive_QN.any(axis=1))
    if not asked.size:
        raise DataError(
            f"{task.data}: no {task.query} view has a right {task.target} view (positives by {task.positives}); "
            f"found {len(queries)} {task.query} and {len(candidates)} {task.target} views"
        )
    if query_QD.shape[-1] != target_ND.shape[-1]:
        raise DataError(
            f"{task.query} embeds to {query_QD.shape[-1]} values and {task.target} to {target_ND.shape[-1]}"
        )
    records = []
    for start in range(0, len(asked), _QUERY_BLOCK):
        block = asked[start : start + _QUERY_BLOCK]
        scores_QN = np.where(is_other_QN[block], _similarities(query_QD[block], target_ND), -np.inf)
        before = first_positive_ranks(scores_QN, is_positive_QN[block], is_other_QN[block])
        if task.rerank:
            scores_QN = _reranked(model, task, [queries[q] for q in block], candidates, scores_QN)
        ranks = first_positive_ranks(scores_QN, is_positive_QN[block], is_other_QN[block])
        for q, scores_N, rank, rank_before in zip(block, scores_QN, ranks, before, strict=True):
            record = _result(queries[q], candidates, scores_N, is_positive_QN[q]) | {"rank": int(rank)}
            records.append(record | ({"rank_before": int(rank_before)} if task.rerank else {}))
            progress("search", len(records), len(asked))
    seconds = (time.perf_counter() - began) / len(records)
    records = [{**record, "seconds": round(seconds, 6)} for record in records]
    return records, len(queries) - len(asked), errors


def _similarities(query_QD: NDArray[np.float32], target_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines ``[Q, N]``; where items have several vectors ``[Q, M, D]``, the best pair counts."""
    queries, targets = ([x] if x.ndim == 2 else np.moveaxis(x, 1, 0) for x in (query_QD, target_ND))
    best: NDArray[np.float32] = np.max([x_QD @ y_ND.T for x_QD in queries for y_ND in targets], axis=0)
    return best


def _reranked(
    model: Model,
    task: RetrievalTask,
    queries: Sequence[Sample],
    candidates: Sequence[Sample],
    scores_QN: NDArray[np.float32],
) -> NDArray[np.float32]:
    """``[Q, N]``: the nearest candidates of each query stand before all others, by the chance that the two match."""
    scores_QN = scores_QN.copy()
    for query, scores_N in zip(queries, scores_QN, strict=True):
        nearest = np.argsort(-scores_N, kind="stable")[: task.rerank]
        nearest = nearest[np.isfinite(scores_N[nearest])]
        pairs = [
            Sample(
                f"{query.id} and {candidates[n].id}",
                views={task.query: query.views[task.query], task.target: candidates[n].views[task.target]},
            )
            for n in nearest
        ]
        scores_N[nearest] = scores_N[nearest].max() + 1.0 + np.asarray(model.match(pairs))
    return scores_QN


def _matches(queries: list[Sample], candidates: list[Sample], positives: str) -> NDArray[np.bool_]:
    """``[Q, N]`` True where the candidate is of the same sample, or of the same class."""
    if positives == "sample":
        asked, found = [sample.id for sample in queries], [sample.id for sample in candidates]
    else:
        asked = [f"label {sample.label}" if sample.label is not None else "" for sample in queries]
        found = [f"label {sample.label}" if sample.label is not None else "none" for sample in candidates]
    is_match_QN: NDArray[np.bool_] = np.array(asked)[:, None] == np.array(found)[None, :]
    return is_match_QN


def _result(
    query: Sample, candidates: list[Sample], scores_N: NDArray[np.float32], is_right_N: NDArray[np.bool_]
) -> dict[str, Any]:
    is_candidate_N = np.isfinite(scores_N)
    order = np.argsort(-scores_N, kind="stable")[:_TOP]
    top = [
        {
            "id": candidates[n].id,
            "label": candidates[n].label,
            "score": round(float(scores_N[n]), 6),
            "is_right": bool(is_right_N[n]),
        }
        for n in order
        if is_candidate_N[n]
    ]
    return {
        "condition": "retrieval",
        "id": query.id,
        "label": query.label,
        "positives": int(is_right_N.sum()),
        "candidates": int(is_candidate_N.sum()),
        "top": top,
    }


def _embed(
    model: Model, samples: list[Sample], modality: str, batch_size: int, progress: Progress
) -> tuple[NDArray[np.float32], list[Sample], list[dict[str, str]]]:
    """``[N, D]`` vectors of the samples that have the modality, those samples, and the ones that failed."""
    present = [sample for sample in samples if modality in sample.views]
    blocks: list[NDArray[np.float32]] = []
    kept: list[Sample] = []
    errors: list[dict[str, str]] = []
    for start in range(0, len(present), batch_size):
        batch = present[start : start + batch_size]
        try:
            vectors, good = _vectors(model, [sample.views[modality] for sample in batch]), batch
        except MediaError:
            single, good = [], []
            for sample in batch:
                try:
                    single.append(_vectors(model, [sample.views[modality]]))
                    good.append(sample)
                except MediaError as error:
                    errors.append({"id": sample.id, "error": str(error)})
            vectors = np.concatenate(single) if single else np.empty((0, 0), dtype=np.float32)
        if good:
            blocks.append(vectors)
            kept.extend(good)
        progress(f"embed {modality}", start + len(batch), len(present))
    if not kept:
        raise DataError(
            f"no {modality} view could be embedded: found {len(present)} of {len(samples)} samples with one"
        )
    return np.concatenate(blocks), kept, errors


def _vectors(model: Model, parts: list[Part]) -> NDArray[np.float32]:
    vectors = np.asarray(model.embed(parts), dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=-1)
    if vectors.ndim not in (2, 3) or len(vectors) != len(parts) or not np.allclose(lengths, 1.0, atol=1e-3):
        raise DataError(
            f"the model embeds {len(parts)} parts as an array of shape {vectors.shape} with lengths "
            f"{lengths.min():.3f} to {lengths.max():.3f}; expected [{len(parts)}, D] of unit length, or "
            f"[{len(parts)}, M, D]"
        )
    return vectors
