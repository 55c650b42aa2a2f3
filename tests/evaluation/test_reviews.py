"""MMHal-Bench and LLaVA-Bench from reviews, by the official rules and their oddities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.reviews import MMHAL_TYPES, llava_bench, llava_scores, mmhal, mmhal_rating


@pytest.mark.parametrize(
    ("review", "rating"),
    [
        ("Explanation ... Rating: 4, somewhat", 4),
        ("RATING: 0", 0),
        ("rating: 6\nrating: 6", 6),
        ("rating: 3 ... or rating: 4", None),
        ("Rating:4", None),
        ("rating: 7", None),
        ("", None),
        ("rating: 10", 1),  # the official rule looks for the text alone
    ],
)
def test_ratings(review, rating):
    assert mmhal_rating(review) == rating


def test_mmhal_means_rates_and_types():
    texts = [f"rating: {rating}" for rating in (0, 1, 2, 3, 4, 5, 6, 3)] + ["no rating"] * 8
    reviews = [{"id": i, "text": text} for i, text in enumerate(texts)]
    found = mmhal(reviews[::-1], [{"id": i} for i in range(16)])
    assert found["summary"]["score"] == pytest.approx(24 / 16) and found["summary"]["unparsed"] == 8
    assert found["summary"]["hallucination_rate"] == pytest.approx((3 + 8) / 16)
    assert list(found["categories"]) == list(MMHAL_TYPES)
    assert found["categories"]["holistic"] == {"n": 2, "score": 3.0, "hallucination_rate": 0.5}
    named = mmhal(reviews[:1], [{"id": 0, "category": "relation"}])
    assert list(named["categories"]) == ["relation"]


@pytest.mark.parametrize(
    ("review", "pair"),
    [
        ("8 7\nBecause", (8, 7)),
        ("8,7", (8, 7)),
        ("8.5 6", (8.5, 6)),
        ("8, 7", (-1, -1)),
        ("8  7", (-1, -1)),
        (" 8 7", (-1, -1)),
        ("8 7 9", (-1, -1)),
        ("8", (-1, -1)),
        ("good bad", (-1, -1)),
        ("nan 7", (-1, -1)),
        ("8 inf", (-1, -1)),
        ("\n8 7", (-1, -1)),
        ("", (-1, -1)),
    ],
)
def test_score_pairs(review, pair):
    assert llava_scores(review) == pair


@given(st.lists(st.tuples(st.sampled_from(["conv", "detail", "complex"]), st.sampled_from(["8 7", "9,3", "8, 7"]))))
def test_failures_stay_in_the_means(rows):
    reviews = [{"id": i, "text": text} for i, (_, text) in enumerate(rows)]
    labels = [{"id": i, "category": category} for i, (category, _) in enumerate(rows)]
    found = llava_bench(reviews, labels)
    pairs = {"8 7": (8, 7), "9,3": (9, 3), "8, 7": (-1, -1)}
    for name, own in [("all", found["summary"]), *found["categories"].items()]:
        kept = [pairs[text] for category, text in rows if name in ("all", category)]
        reference, model = (sum(pair[i] for pair in kept) for i in (0, 1))
        assert own["score"] == (pytest.approx(100 * model / reference) if kept and reference else None)
        assert own["failed"] == sum(pair == (-1, -1) for pair in kept)


def test_llava_bench_needs_categories():
    with pytest.raises(UserError, match="no category"):
        llava_bench([{"id": 1, "text": "8 7"}], [{"id": 1}])
