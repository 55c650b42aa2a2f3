"""How lmms-eval and VLMEvalKit read yes/no answers, and what they make of those that are neither."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.evaluation import pope
from m3po_jax.evaluation.mme import mme
from m3po_jax.evaluation.yes_no import lmms_eval_mme, lmms_eval_pope, vlmevalkit

CASES = [
    # text, VLMEvalKit, lmms-eval on POPE, lmms-eval on MME
    ("Yes", "yes", "yes", "yes"),
    (" no ", "no", "no", "no"),
    ("Yes.", "yes", "other", "yes"),
    ("Yes, there is a dog.", "yes", "other", "yes"),
    ("There is no dog.", "no", "other", "other"),
    ("No, yes", "unknown", "other", "no"),
    ("not at all", "unknown", "other", "no"),
    ("I think yes!no", "unknown", "other", "other"),
    ("yes/no", "unknown", "other", "yes"),
    ("yes-man", "yes", "other", "yes"),
    ("Y", "unknown", "other", "yes"),
    ("n.", "unknown", "other", "no"),
    ("e.yes", "unknown", "other", "yes"),
    ("3.no", "unknown", "other", "no"),
    ("", "unknown", "other", "other"),
    ("1,000 yes,no", "unknown", "other", "other"),
    ("maybe", "unknown", "other", "other"),
]


@pytest.mark.parametrize(("text", "kit", "of_pope", "of_mme"), CASES)
def test_readings(text: str, kit: str, of_pope: str, of_mme: str) -> None:
    assert (vlmevalkit(text), lmms_eval_pope(text), lmms_eval_mme(text)) == (kit, of_pope, of_mme)


def harness(rule: str, said: list[str], right: list[str]) -> tuple[float, float]:
    """Accuracy and F1 as each harness adds them up, from what it read."""
    read = [vlmevalkit(text) if rule == "vlmevalkit" else lmms_eval_pope(text) for text in said]
    accuracy = float(np.mean([one == other for one, other in zip(read, right, strict=True)]))
    tp = sum(one == other == "yes" for one, other in zip(read, right, strict=True))
    fp = sum(one == "yes" != other for one, other in zip(read, right, strict=True))
    if rule == "vlmevalkit":  # whatever is not a yes is a no to its F1
        fn = sum(one != "yes" == other for one, other in zip(read, right, strict=True))
    else:
        fn = sum(one == "no" and other == "yes" for one, other in zip(read, right, strict=True))
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    return accuracy, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


answers = st.lists(
    st.tuples(st.sampled_from([case[0] for case in CASES]), st.sampled_from(["yes", "no"])), min_size=1, max_size=20
)


@pytest.mark.parametrize("rule", ["vlmevalkit", "lmms_eval"])
@given(rows=answers)
def test_pope_adds_up_as_the_harness_does(rule: str, rows: list[tuple[str, str]]) -> None:
    said, right = map(list, zip(*rows, strict=True))
    scored = pope.pope(
        [{"id": place, "text": text} for place, text in enumerate(said)],
        [{"id": place, "label": label} for place, label in enumerate(right)],
        rule,
    )
    accuracy, f1 = harness(rule, said, right)
    assert scored["summary"]["accuracy"] == pytest.approx(accuracy)
    assert scored["summary"]["f1"] == pytest.approx(f1)
    neither = [
        vlmevalkit(text) == "unknown" if rule == "vlmevalkit" else lmms_eval_pope(text) == "other" for text in said
    ]
    assert scored["summary"]["unparsed"] == sum(neither)


def test_mme_by_each_rule() -> None:
    labels = [
        {"id": 1, "label": "Yes", "category": "count", "image": "a"},
        {"id": 2, "label": "No", "category": "count", "image": "a"},
    ]
    given = [{"id": 1, "text": " . yes"}, {"id": 2, "text": "There is no cat."}]
    perception = {
        rule: mme(given, labels, rule)["summary"]["perception"] for rule in ("official", "lmms_eval", "vlmevalkit")
    }
    # " . y" holds no yes officially; a "no" behind the fourth character is one for VLMEvalKit alone.
    assert perception == {"official": 0.0, "lmms_eval": 50.0, "vlmevalkit": 200.0}
