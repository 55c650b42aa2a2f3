import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.scoring.confidence import (
    VARIANTS,
    agreement,
    cluster_confidence,
    confidence_variants,
    mean_confidence,
    normalised_text,
    sum_confidence,
    tail_confidence,
    text_similarity,
    visual_confidence,
)

ragged = st.lists(st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=30), min_size=1, max_size=6)
answers = st.lists(st.sampled_from(["A dog.", "dog", "two cats", "A red car, a dog and a cat.", "a dog, a cat", ""]))


@given(ragged)
def test_variants_equal_their_formulas(rows):
    for row, total, mean, root, tail in zip(
        rows,
        sum_confidence(rows),
        mean_confidence(rows),
        mean_confidence(rows, alpha=0.5),
        tail_confidence(rows),
        strict=True,
    ):
        assert total == pytest.approx(math.fsum(row))
        assert mean == pytest.approx(math.fsum(row) / len(row))
        assert root == pytest.approx(math.fsum(row) / math.sqrt(len(row)))
        worst = sorted(row)[: max(1, len(row) // 5)]
        assert tail == pytest.approx(sum(worst) / len(worst))
        assert tail <= mean + 1e-9


def test_empty_answer_is_its_eos():
    for function in (sum_confidence, mean_confidence, tail_confidence):
        np.testing.assert_array_equal(function([[-0.7]]), [-0.7])
    np.testing.assert_array_equal(cluster_confidence(["", "", "dog"]), [2 / 3, 2 / 3, 1 / 3])


def test_no_recorded_token_means_unknown():
    for function in (sum_confidence, mean_confidence, tail_confidence):
        found = function([[], [-1.0]])
        assert np.isnan(found[0]) and found[1] == -1.0


def test_tail_fraction_is_checked_and_used():
    np.testing.assert_allclose(tail_confidence([[-1, -2, -3, -4]], fraction=0.5), [-3.5])
    with pytest.raises(ValueError, match="fraction"):
        tail_confidence([[-1.0]], fraction=0.0)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("A dog.", "dog", True),
        ("  THE  Cat!", "cat", True),
        ("yes", "no", False),
        ("1.5", "15", False),
        ("-3", "3", False),
        ("🐶", "🐱", False),
        ("左", "右", False),
        ("ﬁve", "five", True),
        ("x²", "x2", True),
        ("", "?!", True),
    ],
)
def test_normalised_text(first, second, same):
    assert (normalised_text(first) == normalised_text(second)) is same


def test_short_answers_cluster_exactly_and_long_ones_by_claims():
    np.testing.assert_allclose(cluster_confidence(["Dog.", "a dog", "cat"]), [2 / 3, 2 / 3, 1 / 3])
    first = "There is a red car on the street, a dog is sleeping and a man reads."
    second = "A dog is sleeping. There is a red car on the street. The sun shines."
    assert agreement(first, second) == pytest.approx(2 / 4)
    assert agreement(first, second, claims=lambda text: {text[0]}) == 0.0
    assert agreement("one two", "two one", short=1) == 0.0
    np.testing.assert_allclose(cluster_confidence([first, second]), [0.75, 0.75])


@given(answers)
def test_cluster_is_a_share_and_follows_permutations(texts):
    found = cluster_confidence(texts)
    assert found.shape == (len(texts),)
    assert all(1 / len(texts) - 1e-12 <= value <= 1 + 1e-12 for value in found)
    np.testing.assert_allclose(cluster_confidence(texts[::-1]), found[::-1])


@given(st.text(max_size=40), st.text(max_size=40))
def test_similarity_is_a_symmetric_share(first, second):
    value = text_similarity(first, second)
    assert 0 <= value <= 1 and value == text_similarity(second, first)
    assert text_similarity(first, first) == 1


def test_similarity_sees_words_and_order():
    twenty = [f"w{i}" for i in range(20)]
    changed = [*twenty[:10], "other", *twenty[11:]]
    assert text_similarity(" ".join(twenty), " ".join(changed)) == pytest.approx(2 * (19 + 17) / (2 * 39))
    assert text_similarity("dog left of cat", "cat left of dog") < 1
    assert text_similarity("A cat.", "a CAT") == 1
    assert text_similarity("one two", "three") == 0


def test_variants_by_name():
    rows, blank, texts = [[-1.0, -3.0], [-0.5]], [[-2.0, -4.0], [-1.5]], ["a dog", "cat"]
    found = confidence_variants(VARIANTS, rows, texts, blank)
    assert set(found) == set(VARIANTS)
    np.testing.assert_allclose(found["sum"], [-4, -0.5])
    np.testing.assert_allclose(found["mean"], [-2, -0.5])
    np.testing.assert_allclose(found["tail"], [-3, -0.5])
    np.testing.assert_allclose(found["cluster"], [0.5, 0.5])
    np.testing.assert_allclose(found["prior"], [-3, -1.5])
    np.testing.assert_allclose(found["visual"], [1, 1])
    with pytest.raises(UserError, match="did you mean 'mean'"):
        confidence_variants(["maen"], rows, texts)
    with pytest.raises(UserError, match="blank image"):
        confidence_variants(["visual"], rows, texts)
    with pytest.raises(ValueError, match="shape"):
        visual_confidence([1.0], [1.0, 2.0])


@given(ragged, st.data())
def test_visual_is_what_the_image_adds(rows, data):
    blank = [data.draw(st.lists(st.floats(-30, 0, width=32), min_size=len(r), max_size=len(r))) for r in rows]
    found = confidence_variants(VARIANTS, rows, [f"answer {i}" for i in range(len(rows))], blank)
    np.testing.assert_allclose(found["visual"] + found["prior"], found["mean"], atol=1e-9)
    same = confidence_variants(["visual"], rows, [""] * len(rows), rows)
    np.testing.assert_allclose(same["visual"], 0, atol=1e-12)
    np.testing.assert_allclose(found["cluster"], 1 / len(rows))


@given(
    st.lists(st.sampled_from(["red car", "sleeping dog", "tall tree near water", "old man"]), min_size=1, max_size=6)
)
def test_long_answers_cluster_by_shared_claims(parts):
    text = ". ".join([*parts, "the sky over the town is blue today"]) + "."
    swapped = ". ".join(["the sky over the town is blue today", *parts[::-1]]) + "."
    assert agreement(text, swapped) == 1.0, "the order of claims does not matter"
    more = text + " Nobody else is to be seen."
    distinct = len(set(parts)) + 1
    assert agreement(text, more) == pytest.approx(distinct / (distinct + 1))
