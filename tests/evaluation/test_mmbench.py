"""MMBench: how an answer is read, and that every rotation has to be right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.mmbench import mmbench, parse

OPTIONS = {"A": "a red bus", "B": "a dog", "C": "the sea"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B: a dog", "B"),
        ("The answer is C", "C"),
        ("A", "A"),
        ("Option A.", "A"),
        ("A dog is shown here", "B"),  # the article; the text decides
        ("A man stands there alone", None),
        ("a dog", "B"),
        ("It is A DOG!", "B"),
        ("A or B", None),
        ("b", None),
        ("D", None),
        ("", None),
        ("a dog by the sea", None),
    ],
)
def test_letters_first_then_texts(text, letter):
    assert parse(text, OPTIONS) == letter


def rows(questions):
    """Answers and labels; `questions` maps an index to the answers to its rotations."""
    answers, labels = [], []
    for index, given_answers in questions.items():
        for rotation, text in enumerate(given_answers):
            key = index + rotation * 1_000_000
            answers.append({"id": key, "text": text})
            labels.append({"id": key, "label": "B", "options": OPTIONS, "category": f"c{index % 2}"})
    return answers, labels


@given(st.dictionaries(st.integers(0, 999_999), st.lists(st.sampled_from("BC"), min_size=1, max_size=4), min_size=1))
def test_a_question_counts_if_all_its_rotations_are_right(questions):
    found = mmbench(*rows(questions))
    right = [set(given_answers) == {"B"} for given_answers in questions.values()]
    summary = found["summary"]
    assert summary["accuracy"] == pytest.approx(sum(right) / len(right)) and summary["questions"] == len(questions)
    first = [given_answers[0] == "B" for given_answers in questions.values()]
    assert summary["single_accuracy"] == pytest.approx(sum(first) / len(first))
    assert summary["accuracy"] <= summary["single_accuracy"] + 1e-12
    for name, own in found["categories"].items():
        kept = [ok for index, ok in zip(questions, right, strict=True) if f"c{index % 2}" == name]
        assert own == {"questions": len(kept), "accuracy": pytest.approx(sum(kept) / len(kept))}


def test_what_cannot_be_scored_is_refused():
    answers, labels = rows({7: ["B"]})
    with pytest.raises(UserError, match="none of the options"):
        mmbench(answers, [labels[0] | {"label": "D"}])
    with pytest.raises(UserError, match="index is no integer"):
        mmbench([{"id": "x", "text": "B"}], [labels[0] | {"id": "x"}])
    assert mmbench([], [])["summary"]["accuracy"] is None
