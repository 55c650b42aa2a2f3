import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.scoring.calibration import auroc, concordance, correlation, reliability, within_prompt_correlation

items = st.lists(st.tuples(st.integers(-4, 4).map(float), st.booleans()), min_size=1, max_size=25)


@given(items)
def test_auroc_equals_counting_pairs(pairs):
    scores, labels = zip(*pairs, strict=True)
    wins = [
        (a > b) + 0.5 * (a == b)
        for (a, positive), (b, other) in itertools.product(pairs, pairs)
        if positive and not other
    ]
    if wins:
        assert auroc(scores, labels) == pytest.approx(np.mean(wins))
    else:
        assert np.isnan(auroc(scores, labels))


def test_auroc_equals_scipy_and_leaves_out_abstentions():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.4
    scores = np.round(rng.normal(size=300) + labels, 1)
    statistic = scipy_stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
    expected = statistic / (labels.sum() * (~labels).sum())
    assert auroc(scores, labels) == pytest.approx(expected)
    assert auroc([*scores, np.nan], [*labels, True]) == pytest.approx(expected)


def test_within_prompt_correlation_ignores_differences_between_prompts():
    # Across prompts the scores rise together; within each they oppose each other.
    ids = ["a", "b", "a", "b", "a", "b", "c", "d", "d", "d"]
    first = [1, 11, 2, 12, 3, 13, 100, 5, 5, 5]
    second = [3, 13, 2, 12, 1, 11, 100, 1, 2, 3]
    assert within_prompt_correlation(ids, first, second) == pytest.approx(-1)
    assert correlation(first[:6], second[:6]) > 0.9
    assert np.isnan(within_prompt_correlation(["a", "a"], [1, 2], [1, 2]))
    with pytest.raises(ValueError, match="ids"):
        within_prompt_correlation(["a"], [1, 2], [1, 2])


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=9))
def test_correlation_equals_numpy(points):
    a, b = np.array(points).T
    if np.std(a) > 1e-3 and np.std(b) > 1e-3:
        assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
        assert correlation([*a, np.nan], [*b, 0.0]) == pytest.approx(correlation(a, b))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_reliability_equals_a_loop(pairs, bins):
    scores, labels = (np.array(column) for column in zip(*pairs, strict=True))
    found = reliability(scores, labels, bins)
    error = 0.0
    for b in range(bins):
        low, high = found.edges[b], found.edges[b + 1]
        inside = (scores >= low) & ((scores < high) | (b == bins - 1))
        assert found.counts[b] == inside.sum()
        if inside.any():
            assert found.mean_scores[b] == pytest.approx(scores[inside].mean())
            assert found.mean_labels[b] == pytest.approx(labels[inside].mean())
            error += inside.mean() * abs(scores[inside].mean() - labels[inside].mean())
        else:
            assert np.isnan(found.mean_scores[b])
    assert found.error == pytest.approx(error)


def test_quantile_bins_serve_log_probs():
    scores = -np.arange(100) / 7
    found = reliability(scores, scores > -7, bins=4, quantiles=True)
    np.testing.assert_array_equal(found.counts, 25)
    assert reliability([-2.0] * 5, [True] * 5, quantiles=True).counts.tolist() == [5]
    with pytest.raises(ValueError, match="quantile"):
        reliability([-1.0], [True])
    assert np.isnan(reliability([], []).error)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 3).map(float), st.booleans()), max_size=20))
def test_concordance_counts_pairs_of_one_prompt(rows):
    ids, scores, labels = ([row[part] for row in rows] for part in range(3))
    keys, wins, pairs = concordance([*ids, "a"], [*scores, np.nan], [*labels, True])
    expected = {}
    for (a, x, true), (b, y, other) in itertools.product(rows, rows):
        if a == b and true and not other:
            won, of = expected.get(a, (0, 0))
            expected[a] = (won + (x > y) + 0.5 * (x == y), of + 1)
    assert {key: (won, of) for key, won, of in zip(keys, wins, pairs, strict=True)} == expected
