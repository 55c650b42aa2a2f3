"""VQAv2 accuracy against the official arithmetic, and its traps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.short_answer import normalize
from m3po_jax.evaluation.vqa import accuracy, vqa

words = st.sampled_from(["yes", "Yes", "no", "2", "two", "a dog", "dog", "Dog.", "black and white"])


@given(words, st.lists(words, min_size=10, max_size=10))
def test_accuracy_leaves_each_annotator_out_once(prediction, truths):
    said, known = prediction, truths
    if len(set(truths)) > 1:
        said, known = normalize(prediction), [normalize(text) for text in truths]
    total = 0.0
    for left_out in range(10):
        matches = [text for place, text in enumerate(known) if place != left_out and text == said]
        total += min(1, len(matches) / 3)
    assert accuracy(prediction, truths) == pytest.approx(total / 10)


def test_the_official_code_normalises_only_where_annotators_differ():
    assert accuracy("Yes", ["yes"] * 10) == 0, "equal answers are compared as they stand"
    assert accuracy("Yes", ["yes"] * 10, "llava") == 1
    assert accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert accuracy(" yes\n", ["yes"] * 10) == 1, "outer white space goes in any case"


@pytest.mark.parametrize(("matches", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_how_many_annotators_agree(matches, value):
    truths = ["red"] * matches + [f"x{i}" for i in range(10 - matches)]
    assert accuracy("Red", truths, "llava" if matches == 10 else "official") == pytest.approx(value)


def test_tables_by_type():
    labels = [
        {"id": 1, "answers": ["yes"] * 9 + ["no"], "category": "yes/no", "question_type": "is the"},
        {"id": 2, "answers": [{"answer": "2"}] * 5 + [{"answer": "3"}] * 5, "category": "number"},
        {"id": 3, "answers": ["red"] * 2 + [f"x{i}" for i in range(8)], "category": "other"},
    ]
    found = vqa([{"id": 3, "text": "red"}, {"id": 1, "text": "Yes."}, {"id": 2, "text": "four"}], labels)
    assert found["summary"]["accuracy"] == pytest.approx((1 + 0 + 0.6) / 3)
    assert found["categories"]["number"] == {"n": 1, "accuracy": 0} and found["categories"]["yes/no"]["accuracy"] == 1
    assert list(found["question_types"]) == ["is the"]
    assert [item["correct"] for item in found["items"]] == [True, False, True]
    assert vqa([], [])["summary"]["accuracy"] is None
    for answers in (None, "yes", [], [3]):
        with pytest.raises(UserError, match="list of the annotators' answers"):
            vqa([{"id": 1, "text": "x"}], [{"id": 1, "answers": answers}])
