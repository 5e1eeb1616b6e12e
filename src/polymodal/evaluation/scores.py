"""Reports, computed from stored predictions alone, so that any run can be scored again without its model.

A predictions file is JSON Lines. The first line is the header: the task and what the answers mean. Every other line is
one prediction: of a question under one condition, or the result of one retrieval query.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polymodal.core.errors import DataError
from polymodal.evaluation import metrics
from polymodal.evaluation.caption_scores import SCORING, bleu, cider, count_right, fact_pattern

FORMAT = 1
"""Version of the predictions file."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over ``n`` questions in 0..1, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float] | Sequence[bool], seed: int = 0) -> Score:
        """The mean of ``values`` (at least one) and its interval."""
        low, high = metrics.bootstrap_interval(values, seed=seed)
        return cls(float(np.mean(values)), low, high, len(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One family of questions, or one direction of retrieval.

    Args:
        family: its name.
        score: accuracy with everything there, or the hit rate at the first K; of ``matching`` over own texts and foils.
        controls: what the score has to beat: ``blind``, ``shuffled``, ``majority``, ``wording``, ``without_image`` ...;
            ``chance`` for retrieval.
        empty_rate: share of predictions without a word.
        unknown_rate: share of predictions that are no right answer to any question of the family (empty ones too).
        metrics: further figures, such as ``R@5`` and ``MRR``.
    """

    family: str
    score: Score
    controls: dict[str, Score] = field(default_factory=dict)
    empty_rate: float = 0.0
    unknown_rate: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What one task measured.

    Args:
        task: its title.
        use: the kind of task.
        scoring: how predictions are compared with answers, in words.
        overall: all questions together.
        rows: one per family, by name.
        errors: the samples that could not be answered, as ``id: message``; they count as wrong.
        skipped: queries left out because nothing in the data is right for them.
        seconds: wall time per condition.
    """

    task: str
    use: Literal["questions", "retrieval", "matching", "masked_words", "captions"]
    scoring: str
    overall: Row
    rows: tuple[Row, ...]
    errors: tuple[str, ...] = ()
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON; :meth:`from_data` turns it back."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_data` wrote."""
        rows = tuple(_row_from_data(row) for row in data["rows"])
        return cls(
            **{**data, "overall": _row_from_data(data["overall"]), "rows": rows, "errors": tuple(data["errors"])}
        )


def read_predictions(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records of a predictions file.

    Raises:
        DataError: if it cannot be read, or is not such a file; names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise DataError(f"{path}:{number}: not JSON; the file is cut off or is no predictions file") from None
        records.append(record)
    header = records.pop(0) if records else None
    if not isinstance(header, dict) or header.get("polymodal_predictions") != FORMAT:
        raise DataError(f"{path}: no header of format {FORMAT} in the first line; expected a file that evaluate wrote")
    return header, records


def rescore(path: str | Path) -> Report:
    """The report of a stored run, computed again.

    Raises:
        DataError: if the file cannot be read or is not a predictions file.
    """
    return score(*read_predictions(path))


def score(header: Mapping[str, Any], records: Iterable[Record]) -> Report:
    """The report of a header and its records; equal records give an equal report.

    Raises:
        DataError: if there is nothing to score.
    """
    records = list(records)
    if not records:
        raise DataError(
            f"task {header['title']}: no predictions to score; the data holds no question that can be asked"
        )
    seed = int(header["task"]["seed"])
    seconds: dict[str, float] = defaultdict(float)
    for record in records:
        seconds[record["condition"]] += record.get("seconds", 0.0)
    errors = tuple(
        f"{record['id']}: {record['error']}" for record in (*header.get("errors", ()), *records) if "error" in record
    )
    if header["task"]["use"] == "retrieval":
        row = _retrieval_row(header, records, seed)
        scoring = f"a hit if a right one is among the first {header['task']['ks'][0]}; ties count against the model"
        skipped = int(header.get("skipped", 0))
        return Report(header["title"], "retrieval", scoring, row, (row,), errors, skipped, dict(seconds))
    if header["task"]["use"] == "captions":
        overall, *by_fact = _caption_rows(records, header["task"]["facts"], seed)
        return Report(header["title"], "captions", SCORING, overall, tuple(by_fact), errors, 0, dict(seconds))
    by_family: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_family[record["family"]].append(record)
    if header["task"]["use"] == "matching":
        named = {"overall": records, **{family: by_family[family] for family in sorted(by_family)}}
        overall, *by_foil = (_matching_row(family, members, header, seed) for family, members in named.items())
        return Report(header["title"], "matching", _MATCHING, overall, tuple(by_foil), errors, 0, dict(seconds))
    rows = tuple(_question_row(family, by_family[family], seed) for family in sorted(by_family))
    known = {family: _answers(members) for family, members in by_family.items()}
    overall = _question_row("overall", records, seed, known)
    use = header["task"]["use"]
    return Report(header["title"], use, metrics.NORMALISATION, overall, rows, errors, 0, dict(seconds))


_MATCHING = (
    "yes from a threshold on, which separates one half of the pairs best and judges the other half, and the other way "
    "round, under each condition anew; every text has its foil, so that a constant answer is right in 0.5"
)


def _matching_row(family: str, records: Sequence[Record], header: Mapping[str, Any], seed: int) -> Row:
    """Accuracy over own texts and foils, with the area under the curve and the pairs in the right order."""
    by_condition: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_condition[record["condition"]].append(record)
    scores, further = {}, {}
    for condition, members in by_condition.items():
        own, foil = (np.array([record[name] for record in members]) for name in ("own", "foil"))
        is_other = np.random.default_rng(seed).permutation(len(own)) % 2 == 1
        right = np.zeros(len(own))
        for half in (is_other, ~is_other):
            threshold = metrics.best_threshold(own[~half], foil[~half])
            right[half] = ((own[half] >= threshold).astype(float) + (foil[half] < threshold)) / 2
        scores[condition] = Score.of(right.tolist(), seed)
        suffix = "" if condition == "full" else f" {condition}"
        if condition == "full":
            further["at 0.5"] = float(((own >= 0.5).mean() + (foil < 0.5).mean()) / 2)
        further[f"AUC{suffix}"] = metrics.roc_auc(own, foil)
        further[f"pairs{suffix}"] = float((own > foil).mean())
    full = scores.pop("full")
    if "majority" in header["task"]["conditions"]:
        scores["majority"] = Score(0.5, 0.5, 0.5, full.n)
    return Row(family, full, scores, metrics=further)


def _caption_rows(records: Sequence[Record], facts: str, seed: int) -> list[Row]:
    """The row of whole things, with BLEU and CIDEr of all conditions, and one of each group of facts."""
    by_condition: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_condition[record["condition"]].append(record)
    pattern, right = fact_pattern(facts), {}
    further: dict[str, float] = {}
    for condition, members in by_condition.items():
        said, true = ([record[key] for record in members] for key in ("prediction", "answer"))
        right[condition] = count_right(said, true, pattern)
        suffix = "" if condition == "full" else f" {condition}"
        further |= {f"BLEU-4{suffix}": bleu(said, true), f"CIDEr{suffix}": cider(said, true)}
    rows = []
    for name in right["full"]:
        scores = {condition: Score.of(found[name], seed) for condition, found in right.items()}
        rows.append(Row(name, scores.pop("full"), scores, metrics=further if name == "overall" else {}))
    return rows


def _answers(records: Iterable[Record]) -> set[str]:
    return {metrics.normalise(record["answer"]) for record in records}


def _question_row(family: str, records: list[Record], seed: int, known: Mapping[str, set[str]] | None = None) -> Row:
    known = known or {family: _answers(records)}
    by_condition: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_condition[record["condition"]].append(record)
    full = by_condition.pop("full")
    given = [(record["family"], metrics.normalise(record["prediction"])) for record in full]
    return Row(
        family,
        _accuracy(full, seed),
        {condition: _accuracy(members, seed) for condition, members in by_condition.items()},
        empty_rate=float(np.mean([not words for _, words in given])),
        unknown_rate=float(np.mean([words not in known[place] for place, words in given])),
    )


def _accuracy(records: Sequence[Record], seed: int) -> Score:
    predictions = [record["prediction"] for record in records]
    return Score.of(metrics.exact_match(predictions, [record["answer"] for record in records]).tolist(), seed)


def _retrieval_row(header: Mapping[str, Any], records: Sequence[Record], seed: int) -> Row:
    task = header["task"]
    ks = task["ks"]
    ranks = np.array([record["rank"] for record in records])
    positives = [record["positives"] for record in records]
    candidates = [record["candidates"] for record in records]
    further = {f"R@{k}": metrics.hit_rate(ranks, k) for k in ks}
    further["MRR"] = metrics.mean_reciprocal_rank(ranks)
    if task.get("rerank"):
        before = np.array([record["rank_before"] for record in records])
        further |= {f"R@{k} before": metrics.hit_rate(before, k) for k in ks}
    if all(record["label"] is not None for record in records):
        further["class precision@1"] = float(np.mean([r["label"] == r["top"][0]["label"] for r in records]))
    chance = metrics.chance_hit_rate(positives, candidates, ks[0])
    controls = {"chance": Score(chance, chance, chance, len(records))}
    return Row(
        f"{task['query']} -> {task['target']}", Score.of((ranks < ks[0]).tolist(), seed), controls, metrics=further
    )


def _row_from_data(data: Mapping[str, Any]) -> Row:
    controls = {name: Score(**value) for name, value in data["controls"].items()}
    return Row(**{**data, "score": Score(**data["score"]), "controls": controls})
