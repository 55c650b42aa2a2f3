"""Normalisation and exact match of short answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.short_answer import llava_normalize, normalize, short_answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        (" The Blue.\n", "blue"),
        ("a triangle!", "triangle"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("red-blue", "red blue"),
        ("red - blue", "red blue"),
        ("red- blue-ish", "red blueish"),  # one mark beside a space removes them all, officially
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("the", ""),
        ("it's", "it's"),
        (".".join("a" * 40), "a" * 33 + "".join(".a" for _ in range(7))),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@given(st.text(alphabet="abc 12.,-'?\n", max_size=20))
def test_normalized_text_has_no_outer_space_or_capitals(text):
    done = normalize(text)
    assert done == " ".join(done.split()) == done.lower()
    assert normalize(text.upper()) == done


@pytest.mark.parametrize(
    ("text", "official", "llava"),
    [
        ("Yes", "yes", "yes"),
        ("The Blue.", "blue", "blue"),
        ("it's red", "it's red", "it 's red"),
        ("the dog's", "dog's", "dog 's"),
        ("red,blue", "red blue", "redblue"),
        ("red, blue", "red blue", "red blue"),
        ("yes?no", "yes no", "yesno"),
        ("1,000", "1000", "1000"),
        ("1,000-2,000", "10002000", "1000 2000"),
        ("black,white/red", "black white red", "blackwhite red"),
        ("3.5", "3.5", "3.5"),
        ("Two cats", "2 cats", "2 cats"),
        ("dont know", "don't know", "don't know"),
        ("None of the above!", "0 of above", "0 of above"),
        ("", "", ""),
    ],
)
def test_llavas_normaliser_is_not_the_official_one(text, official, llava):
    assert normalize(text) == official
    assert llava_normalize(text) == llava


def test_accuracy_by_type():
    references = [
        {"id": 1, "reference": "blue", "category": "color"},
        {"id": 2, "reference": "red", "category": "color"},
        {"id": 3, "reference": "yes", "category": "yesno"},
    ]
    answers = [{"id": 3, "text": "Yes."}, {"id": 2, "text": "teal"}, {"id": 1, "text": "the blue"}]
    result = short_answers(answers, references)
    assert result["summary"] == {"n": 3, "correct": 2, "accuracy": pytest.approx(2 / 3), "degenerate": []}
    assert result["categories"]["color"]["accuracy"] == 0.5
    assert [item["correct"] for item in result["items"]] == [True, False, True]
    assert short_answers([], [])["summary"]["accuracy"] is None
    with pytest.raises(UserError, match="no answer"):
        short_answers(answers[:2], references)
