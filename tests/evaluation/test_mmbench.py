"""MMBench: every rotation has to be right, and what cannot be scored is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.letters import RULES
from m3po_jax.evaluation.mmbench import mmbench

OPTIONS = {"A": "a red bus", "B": "a dog", "C": "the sea"}


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


def test_options_that_a_table_leaves_empty_are_none():
    options = {"a": "a cat", "B": "a banana", "C": float("nan"), "D": None, "E": ""}
    answers = [{"id": 1, "text": "a banana"}, {"id": 2, "text": "C"}]
    labels = [{"id": key, "label": "b", "options": options} for key in (1, 2)]
    assert [item["parsed"] for item in mmbench(answers, labels)["items"]] == ["B", None]


def test_the_rules_differ_where_they_say():
    question = [{"id": 1, "label": "B", "options": OPTIONS}]
    text = "I would say that it is not a cat, so the answer B seems to be the best one here"
    by_rule = {rule: mmbench([{"id": 1, "text": text}], question, rule)["items"][0]["parsed"] for rule in RULES}
    assert by_rule == {"stated": "B", "vlmevalkit": None}, "VLMEvalKit looks at the last five words"
