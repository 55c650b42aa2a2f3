"""The bootstrap resamples images and is reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3po_jax.evaluation import bootstrap as module
from m3po_jax.evaluation.bootstrap import bootstrap, image_sums, ratio_of_sums, resampled, weights


def test_matches_the_normal_interval_of_a_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, size=400)
    result = bootstrap(range(400), np.column_stack([values, np.ones(400)]), resamples=4000)
    error = values.std(ddof=1) / 20
    assert result["estimate"] == pytest.approx(values.mean())
    assert result["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert result["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_repeating_questions_does_not_shrink_the_interval():
    rng = np.random.default_rng(1)
    values = np.column_stack([rng.integers(0, 2, 60), np.ones(60)])
    once = bootstrap(range(60), values)
    many = bootstrap([image for image in range(60) for _ in range(6)], np.repeat(values, 6, axis=0))
    assert (once["low"], once["high"]) == (many["low"], many["high"])
    assert many["n_images"] == 60


def test_seed_and_degenerate_cases():
    values = [[1.0, 2.0], [0.0, 3.0], [2.0, 2.0]]
    assert bootstrap("abc", values, seed=1) == bootstrap("abc", values, seed=1)
    assert bootstrap("abc", values, seed=1, resamples=50) != bootstrap("abc", values, seed=2, resamples=50)
    nothing = bootstrap([], np.zeros((0, 2)))
    assert nothing["estimate"] is nothing["low"] is None
    undefined = bootstrap("ab", [[0.0, 0.0], [1.0, 1.0]], resamples=400)
    assert undefined["estimate"] == undefined["low"] == 1
    assert 60 < undefined["undefined"] < 140  # a quarter of the resamples miss the second image
    assert bootstrap("a", [[0.0, 0.0]])["estimate"] is None


def test_paired_difference_of_equal_arms_is_zero():
    values = np.random.default_rng(2).integers(0, 5, size=(30, 2)) + np.array([0, 5])
    result = bootstrap(
        range(30),
        np.hstack([values, values]),
        lambda sums: ratio_of_sums(sums[..., :2]) - ratio_of_sums(sums[..., 2:]),
    )
    assert result["estimate"] == result["low"] == result["high"] == 0


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=20))
def test_interval_lies_between_the_extremes(rows):
    values = np.array([(hits, hits + others) for _, hits, others in rows], dtype=float)
    result = bootstrap([image for image, _, _ in rows], values, resamples=200)
    assert result["estimate"] == pytest.approx(values[:, 0].sum() / values[:, 1].sum())
    rates = [
        ratio_of_sums(values[[row[0] == image for row in rows]].sum(axis=0)) for image in {row[0] for row in rows}
    ]
    assert min(rates) - 1e-12 <= result["low"] <= result["high"] <= max(rates) + 1e-12


@pytest.mark.parametrize("wrong", [{"resamples": 0}, {"level": 1.0}, {"images": "ab"}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError):
        bootstrap(**({"images": "a", "values": [[1.0, 1.0]]} | wrong))


def test_weights_are_the_sample_and_then_draws_of_as_many_images(monkeypatch):
    drawn = np.concatenate(list(weights(6, 500, seed=3)))
    assert drawn.shape == (501, 6) and (drawn[0] == 1).all() and (drawn.sum(axis=1) == 6).all()
    assert (drawn != np.concatenate(list(weights(6, 500, seed=4)))).any()
    np.testing.assert_allclose(drawn[1:].mean(axis=0), 1.0, atol=0.15)
    monkeypatch.setattr(module, "_BLOCK", 60)
    np.testing.assert_array_equal(np.concatenate(list(weights(6, 500, seed=3))), drawn, "blocks draw the same")


def test_sums_by_image():
    table = image_sums(["b", "a", "b"], np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), {"a": 0, "b": 1, "c": 2})
    np.testing.assert_array_equal(table, [[3, 4], [6, 8], [0, 0]])
    np.testing.assert_array_equal(resampled(table, 3, 0)[0], [9, 12])
