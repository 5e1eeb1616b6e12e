from itertools import combinations

import numpy as np
import pytest

from polymodal.core.errors import DataError
from polymodal.evaluation.metrics import (
    bootstrap_interval,
    chance_hit_rate,
    confusion,
    exact_match,
    first_positive_ranks,
    hit_rate,
    mean_reciprocal_rank,
    normalise,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red", "red"), (" the  RED\tcube.\n", "red cube"), ("An apple!", "apple"), ("A", "a"), ("a", "a"),
        ("theory", "theory"), ("-3", "-3"), ("+2.", "+2"), ("", ""), ("...", ""), ("'yes'", "yes"), ("1.5", "1.5"),
        ("red, blue", "red, blue"), ("the 'cat'", "cat"),
    ],
)  # fmt: skip
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_exact_match():
    assert exact_match(["Red.", "two", ""], ["red", "2", "blue"]).tolist() == [True, False, False]
    with pytest.raises(DataError, match="found 1 predictions for 2 answers"):
        exact_match(["a"], ["a", "b"])


def test_bootstrap_interval_is_that_of_the_binomial():
    values = np.arange(400) % 4 == 0
    low, high = bootstrap_interval(values, resamples=4000)
    width = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - width, abs=0.008)
    assert high == pytest.approx(0.25 + width, abs=0.008)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < 0.25 < narrow[1] < high
    assert bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)
    assert np.isnan(bootstrap_interval([])).all()


def test_ranks_equal_a_loop_over_sorted_lists():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(40, 12)).astype(np.float32)  # many ties
    is_positive = rng.random((40, 12)) < 0.3
    is_candidate = rng.random((40, 12)) < 0.8
    is_positive[:, 0] = is_candidate[:, 0] = True
    expected = []
    for q in range(40):
        rows = [(-scores[q, n], is_positive[q, n]) for n in range(12) if is_candidate[q, n]]
        rows.sort()  # a False (negative) stands before a True of the same score
        expected.append([positive for _, positive in rows].index(True))
    assert first_positive_ranks(scores, is_positive, is_candidate).tolist() == expected


def test_perfect_and_constant_scores():
    eye = np.eye(5, dtype=bool)
    perfect = first_positive_ranks(eye.astype(float), eye)
    assert (hit_rate(perfect, 1), mean_reciprocal_rank(perfect)) == (1.0, 1.0)
    constant = first_positive_ranks(np.zeros((5, 5)), eye)
    assert constant.tolist() == [4] * 5
    assert hit_rate(constant, 4) == 0.0
    assert hit_rate(constant, 5) == 1.0
    assert mean_reciprocal_rank(constant) == pytest.approx(0.2)


def test_hit_rate_is_not_the_share_of_positives_found():
    ranks = first_positive_ranks(np.array([[5.0, 4, 3, 2, 1]]), np.ones((1, 5), dtype=bool))
    assert hit_rate(ranks, 1) == 1.0


def test_queries_without_a_positive_and_nan_are_refused():
    with pytest.raises(DataError, match=r"query 1 has no positive among its candidates \(1 such queries\)"):
        first_positive_ranks(np.zeros((2, 2)), np.array([[True, False], [False, False]]))
    with pytest.raises(DataError, match="found 1 NaN among the similarities"):
        first_positive_ranks(np.array([[np.nan, 0.0]]), np.array([[True, False]]))


def test_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    words = np.array(["red", "green", "blue"])
    answers, predictions = words[rng.integers(3, size=200)], words[rng.integers(3, size=200)]
    assert exact_match(predictions, answers).mean() == sklearn.accuracy_score(answers, predictions)
    labels, counts = confusion(predictions.tolist(), answers.tolist())
    assert labels == ["blue", "green", "red"]
    np.testing.assert_array_equal(counts[:, :3], sklearn.confusion_matrix(answers, predictions, labels=labels))
    assert counts[:, 3].sum() == 0
    scores = rng.normal(size=(50, 20))
    target = rng.integers(20, size=50)
    is_positive = np.arange(20) == target[:, None]
    ranks = first_positive_ranks(scores, is_positive)
    for k in (1, 5):
        assert hit_rate(ranks, k) == sklearn.top_k_accuracy_score(target, scores, k=k, labels=np.arange(20))
    mrr = sklearn.label_ranking_average_precision_score(is_positive, scores)
    assert mean_reciprocal_rank(ranks) == pytest.approx(mrr)


def test_confusion_counts_unknown_predictions_apart():
    labels, counts = confusion(["Yes.", "maybe", "", "no"], ["yes", "yes", "no", "no"])
    assert labels == ["no", "yes"]
    assert counts.tolist() == [[1, 0, 1], [0, 1, 1]]


def test_chance_equals_counting_all_draws():
    for positives, candidates, k in ((2, 6, 1), (2, 6, 3), (1, 4, 4), (5, 6, 2)):
        draws = list(combinations(range(candidates), k))
        expected = np.mean([any(n < positives for n in draw) for draw in draws])
        assert chance_hit_rate([positives], [candidates], k) == pytest.approx(expected)
    assert chance_hit_rate([1, 2], [4, 4], 1) == pytest.approx(0.375)
