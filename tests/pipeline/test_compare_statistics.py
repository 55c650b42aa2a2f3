"""Statistics of a comparison against scipy, the metrics' own code and the frontier's scalar code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from m3po_jax.evaluation import chair, frontier, pope, short_answer
from m3po_jax.pipeline.compare import statistics

OBJECTS = ["dog", "cat", "car", "bus", "tree"]
CAPTIONS = st.lists(st.lists(st.sampled_from(OBJECTS), max_size=4), min_size=1, max_size=8)
TRUTHS = st.sets(st.sampled_from(OBJECTS), max_size=4)


def sums_of(metric, items, images):
    order = {image: place for place, image in enumerate(dict.fromkeys(images.values()))}
    columns, metrics = statistics.METRICS[metric]
    table = statistics.image_sums(items, images, order, columns)
    return metrics(statistics.weights(list(order), 3, 0) @ table)


def same(found, expected):
    for key, values in found.items():
        wanted = expected[key]
        assert values.shape == (4,)
        assert np.isnan(values[0]) if wanted is None else values[0] == pytest.approx(wanted), key


@settings(max_examples=40, deadline=None)
@given(CAPTIONS, st.data())
def test_chair_equals_the_benchmark_itself(captions, data):
    records = [
        {"id": f"i{n}", "text": " ".join(words), "objects": sorted(data.draw(TRUTHS)), "tokens": n}
        for n, words in enumerate(captions)
    ]
    scored = chair.chair(records, chair.vocabulary(dict.fromkeys(OBJECTS, ())))
    found = sums_of("chair", scored["items"], {record["id"]: record["id"] for record in records})
    same(found, scored["summary"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["Yes", "No", "maybe"]), st.sampled_from(["Yes", "No"])), min_size=1))
def test_pope_and_short_answers_equal_the_benchmarks_themselves(rows):
    answers = [{"id": str(n), "text": said} for n, (said, _) in enumerate(rows)]
    images = {str(n): f"image-{n // 3}" for n in range(len(rows))}
    labels = [{"id": str(n), "label": truth, "category": "all"} for n, (_, truth) in enumerate(rows)]
    scored = pope.pope(answers, labels)
    same(sums_of("pope", scored["items"], images), scored["summary"])
    labels = [{"id": str(n), "reference": truth, "category": "all"} for n, (_, truth) in enumerate(rows)]
    scored = short_answer.short_answers(answers, labels)
    same(sums_of("short_answer", scored["items"], images), scored["summary"])


def test_weights_are_the_sample_and_then_draws_of_as_many_images():
    drawn = statistics.weights(list("abcdef"), 500, seed=3)
    assert drawn.shape == (501, 6) and (drawn[0] == 1).all() and (drawn.sum(axis=1) == 6).all()
    assert (drawn == statistics.weights(list("abcdef"), 500, seed=3)).all()
    assert (drawn != statistics.weights(list("abcdef"), 500, seed=4)).any()
    np.testing.assert_allclose(drawn[1:].mean(axis=0), 1.0, atol=0.15)


POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6)


@settings(max_examples=200, deadline=None)
@given(POINTS, st.floats(0, 1), st.floats(0, 1))
def test_matched_equals_the_scalar_frontier_inside_and_bounds_it_beyond(points, recall, rate):
    expected = frontier.matched({"recall": recall, "chair_i": rate}, [{"recall": r, "chair_i": c} for r, c in points])
    one = statistics.matched(
        np.array([recall]), np.array([rate]), np.array([[r for r, _ in points]]), np.array([[c for _, c in points]])
    )
    highest = max(r for r, _ in points)
    assert bool(one.beyond[0]) == (recall > highest)
    if expected["delta_chair_i"] is not None:
        assert one.delta[0] == pytest.approx(expected["delta_chair_i"], abs=1e-6)
    elif recall > highest:
        end = min(c for r, c in points if r == highest)
        assert one.delta[0] == pytest.approx(rate - end)
    else:
        assert np.isnan(one.delta[0])


def test_a_point_without_value_does_not_move_the_frontier():
    recall, rate = np.array([0.5, 0.5]), np.array([0.1, 0.1])
    points = np.array([[0.4, 0.6], [0.4, 0.6]]), np.array([[0.2, 0.4], [0.2, 0.4]])
    with_gap = [np.concatenate([column, np.full((2, 1), np.nan)], axis=1) for column in points]
    np.testing.assert_array_equal(
        statistics.matched(recall, rate, *points).delta, statistics.matched(recall, rate, *with_gap).delta
    )
    np.testing.assert_allclose(statistics.matched(recall, rate, *points).delta, 0.1 - 0.3)


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
    drawn = statistics.weights(range(200), 4000, seed=1)
    found = statistics.summarise([(drawn @ w) / (drawn @ m) for w, m in zip(wrong, mentions, strict=True)])

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
    drawn = statistics.weights(range(100), 500, seed=0)
    value, shifted = (drawn @ base) / 100, (drawn @ (base + 0.25)) / 100
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
