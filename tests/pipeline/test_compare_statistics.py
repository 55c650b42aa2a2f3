"""Statistics of a comparison against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from m3po_jax.evaluation.bootstrap import resampled
from m3po_jax.pipeline.compare import statistics


def test_seed_interval_is_students():
    own = [0.10, 0.30, 0.25, 0.05]
    found = statistics.summarise([np.full(11, value) for value in own])
    low, high = stats.t.interval(0.95, len(own) - 1, np.mean(own), stats.sem(own))
    assert (found["t_low"], found["t_high"]) == pytest.approx((low, high))
    assert found["mean"] == pytest.approx(np.mean(own)) and found["sd"] == pytest.approx(np.std(own, ddof=1))
    assert found["low"] == found["high"] == pytest.approx(np.mean(own)), "all resamples agree here"
    single = statistics.summarise([np.array([0.5, 0.4, 0.6])])
    assert single["sd"] is None and single["t_low"] is None and single["mean"] == 0.5


def test_image_interval_agrees_with_scipys_bootstrap():
    rng = np.random.default_rng(0)
    wrong = rng.integers(0, 3, size=(3, 200)).astype(float)  # three seeds on the same images
    mentions = wrong + rng.integers(1, 4, size=(3, 200))
    sums = resampled(np.concatenate([wrong, mentions]).T, 4000, seed=1)
    found = statistics.summarise([sums[:, n] / sums[:, 3 + n] for n in range(3)])

    def statistic(index):
        rows = index.astype(int)
        return np.mean([w[rows].sum() / m[rows].sum() for w, m in zip(wrong, mentions, strict=True)])

    scipys = stats.bootstrap(
        (np.arange(200),),
        statistic,
        n_resamples=4000,
        method="percentile",
        vectorized=False,
        rng=rng,
    ).confidence_interval
    assert found["mean"] == pytest.approx(statistic(np.arange(200)))
    assert (found["low"], found["high"]) == pytest.approx((scipys.low, scipys.high), abs=0.004)


def test_an_image_interval_of_a_difference_is_paired():
    """Two systems that fail on the same images differ by a constant: the paired interval has no width."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 100).astype(float)
    value, shifted = (resampled(np.stack([base, base + 0.25], axis=1), 500, seed=0) / 100).T
    found = statistics.summarise([shifted - value])
    assert found["low"] == pytest.approx(0.25) and found["high"] == pytest.approx(0.25)
    alone = statistics.summarise([value])
    assert alone["high"] - alone["low"] > 0.1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=6),
    st.lists(st.floats(-0.5, 0.5), min_size=20, max_size=20),
    st.sampled_from(["lower", "higher"]),
)
def test_a_claim_needs_both_intervals_on_one_side_of_zero(own, noise, better):
    values = [np.concatenate([[value], value + np.array(noise)]) for value in own]
    found = statistics.summarise(values)
    spans = [(found["low"], found["high"]), (found["t_low"], found["t_high"])]
    judged = statistics.outcome(found, better)
    sides = {np.sign(low) if np.sign(low) == np.sign(high) else 0 for low, high in spans}
    if judged in ("better", "worse"):
        assert sides == {-1 if (judged == "better") == (better == "lower") else 1}
    else:
        assert judged == "tie" and (0 in sides or len(sides) == 2)


def test_nothing_is_claimed_of_few_seeds_or_of_nothing():
    clear = [np.full(5, -0.3), np.full(5, -0.31)]
    assert statistics.outcome(statistics.summarise(clear), "lower") == "few_seeds"
    assert statistics.outcome(statistics.summarise([*clear, np.full(5, -0.3)]), "lower") == "better"
    gap = statistics.summarise([*clear, np.full(5, np.nan)])
    assert gap["mean"] is None and gap["seeds"][2] is None
    assert statistics.outcome(gap, "lower") == "undefined"
