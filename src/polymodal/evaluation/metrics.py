"""Metrics, each a pure function of arrays or strings.

Shape legend: ``N`` questions or candidates, ``Q`` queries, ``K`` labels.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polymodal.core.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

NORMALISATION = (
    "exact match after: lower case, white space collapsed, punctuation around the answer and a leading "
    "article (a, an, the) removed"
)
"""What :func:`normalise` does, for reports."""

_EDGES = string.punctuation.replace("-", "").replace("+", "") + string.whitespace
_ARTICLES = ("a ", "an ", "the ")


def normalise(text: str) -> str:
    """The form in which answers are compared, as :data:`NORMALISATION` states.

    Examples: ``"The Red cube."`` -> ``"red cube"``; ``" -3 "`` -> ``"-3"``; ``"A"`` -> ``"a"``.
    """
    words = " ".join(text.lower().split()).strip(_EDGES)
    for article in _ARTICLES:
        if words.startswith(article):
            return words.removeprefix(article).lstrip(_EDGES)
    return words


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> NDArray[np.bool_]:
    """``[N]`` bool: the prediction equals the answer, both normalised.

    Raises:
        DataError: if the two differ in number.
    """
    if len(predictions) != len(answers):
        raise DataError(f"found {len(predictions)} predictions for {len(answers)} answers, expected as many")
    pairs = zip(predictions, answers, strict=True)
    return np.array([normalise(a) == normalise(b) for a, b in pairs], dtype=bool)


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    Args:
        values: ``[N]`` scores, one per question.
        level: share of resampled means inside the interval, between 0 and 1.
        seed: the same seed and values give the same interval.
        resamples: how many times ``N`` values are drawn with replacement.

    Returns:
        Lower and upper end; both NaN if there are no values.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.size == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [scores[rng.integers(scores.size, size=scores.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def first_positive_ranks(
    scores_QN: NDArray[Any], is_positive_QN: NDArray[np.bool_], is_candidate_QN: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """``[Q]`` int64: how many negatives stand before the best positive of each query; 0 is a hit at rank 1.

    A negative that ties with the best positive stands before it, so that a model that gives everything the same score
    earns nothing.

    Args:
        scores_QN: ``[Q, N]`` similarity, larger is nearer.
        is_positive_QN: ``[Q, N]`` True where the candidate is right for the query; several may be.
        is_candidate_QN: ``[Q, N]`` False where the candidate must not count, such as the query itself; all, if None.

    Raises:
        DataError: if a query has no positive among its candidates, or a score is NaN.
    """
    if np.isnan(scores_QN).any():
        raise DataError(f"found {int(np.isnan(scores_QN).sum())} NaN among the similarities, expected numbers")
    candidate_QN = np.ones_like(is_positive_QN) if is_candidate_QN is None else is_candidate_QN
    positive_QN = is_positive_QN & candidate_QN
    without = np.flatnonzero(~positive_QN.any(axis=1))
    if without.size:
        raise DataError(
            f"query {without[0]} has no positive among its candidates ({without.size} such queries); "
            "leave them out, or give every query at least one"
        )
    best_Q1 = np.where(positive_QN, scores_QN, -np.inf).max(axis=1, keepdims=True)
    is_ahead_QN = candidate_QN & ~positive_QN & (scores_QN >= best_Q1)
    ranks: NDArray[np.int64] = is_ahead_QN.sum(axis=1, dtype=np.int64)
    return ranks


def hit_rate(ranks_Q: ArrayLike, k: int) -> float:
    """R@K: the share of queries with a positive among their first ``k`` results.

    With several positives per query this is what image-text retrieval calls recall at K; it is not the share of the
    positives found.
    """
    return float((np.asarray(ranks_Q) < k).mean())


def roc_auc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """The area under the ROC curve: how often a positive gets more than a negative; a tie counts one half.

    Source: Hanley and McNeil 1982, "The Meaning and Use of the Area under a ROC Curve", section III.

    Args:
        positives: ``[N]`` scores of what belongs together, larger is surer.
        negatives: ``[M]`` scores of what does not.

    Raises:
        DataError: if there are none of either.
    """
    above, below = np.asarray(positives, dtype=np.float64), np.sort(np.asarray(negatives, dtype=np.float64))
    if not above.size or not below.size:
        raise DataError(f"found {above.size} positives and {below.size} negatives, expected some of both")
    beaten = np.searchsorted(below, above, side="left") + np.searchsorted(below, above, side="right")
    return float(beaten.mean() / (2 * len(below)))


def best_threshold(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    """The threshold from which on saying yes is right most often, positives and negatives counting alike.

    It lies halfway between two neighbouring scores, or at the lowest one, where yes is always said; the lowest of
    several equally good ones. Without scores it is 0.5.
    """
    values = np.unique(np.concatenate([positives, negatives]))
    if not len(positives) or not len(negatives):
        return 0.5
    thresholds = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2])
    share_yes, share_no = (
        np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores) for scores in (positives, negatives)
    )
    return float(thresholds[np.argmax(share_no - share_yes)])


def mean_reciprocal_rank(ranks_Q: ArrayLike) -> float:
    """Mean of 1 / (rank of the first positive, counted from 1)."""
    return float((1.0 / (np.asarray(ranks_Q, dtype=np.float64) + 1.0)).mean())


def chance_hit_rate(positives_Q: ArrayLike, candidates_Q: ArrayLike, k: int) -> float:
    """The expected :func:`hit_rate` of a random order: mean of 1 - C(N - P, k) / C(N, k).

    Args:
        positives_Q: ``[Q]`` positives of each query, P.
        candidates_Q: ``[Q]`` candidates of each query, N >= P.
        k: how many results count.
    """
    positives = np.asarray(positives_Q, dtype=np.float64)
    candidates = np.asarray(candidates_Q, dtype=np.float64)
    miss = np.ones_like(positives)
    for i in range(k):
        miss *= np.clip((candidates - positives - i) / np.maximum(candidates - i, 1.0), 0.0, 1.0)
    return float((1.0 - miss).mean())


def confusion(predictions: Sequence[str], answers: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """How often each answer was given for each right answer, all normalised.

    Returns:
        The ``K`` labels that occur among ``answers``, sorted, and counts ``[K, K + 1]``: row = right answer,
        column = prediction, last column = a prediction that is no label.
    """
    labels = sorted({normalise(answer) for answer in answers})
    column = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for prediction, answer in zip(predictions, answers, strict=True):
        counts[column[normalise(answer)], column.get(normalise(prediction), len(labels))] += 1
    return labels, counts
