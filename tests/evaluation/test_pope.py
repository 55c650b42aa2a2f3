"""POPE against the official scorer's arithmetic and files."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.pope import is_unparsed, parse, pope

SHARED = Path(os.environ.get("M3PO_SHARED", Path(__file__).parents[2] / "../shared"))


@pytest.mark.parametrize(
    ("text", "expected", "unparsed"),
    [
        ("Yes", "yes", False),
        ("No", "no", False),
        ("no", "no", False),
        ("No, there is none.", "no", False),
        ("It is not. Yes", "no", False),
        ("Yes. No", "yes", False),
        ("NO", "yes", True),
        ("No!", "yes", True),
        ("Not visible", "yes", True),
        ("There isn't", "yes", True),
        ("none", "yes", True),
        ("No\n", "yes", True),
        ("No,there", "yes", True),
        ("", "yes", True),
        ("Yes, there is not only one", "no", False),
        ("YES it is", "yes", False),
        ("eyes", "yes", True),
    ],
)
def test_official_rule(text, expected, unparsed):
    assert parse(text) == expected
    assert is_unparsed(text) == unparsed


def official(answers, labels):
    """The published script's loop, kept to its arithmetic."""
    predicted, truth = [], [0 if label == "no" else 1 for label in labels]
    for text in answers:
        sentence = text.split(".")[0] if text.find(".") != -1 else text
        words = sentence.replace(",", "").split(" ")
        predicted.append(0 if "No" in words or "not" in words or "no" in words else 1)
    pairs = list(zip(predicted, truth, strict=True))
    tp, fp = pairs.count((1, 1)), pairs.count((1, 0))
    tn, fn = pairs.count((0, 0)), pairs.count((0, 1))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": predicted.count(1) / len(predicted),
    }


ANSWERS = ["Yes", "No", "no.", "Yes, it is", "maybe", "not, really", "No!", "", "There is no dog.", "yes no"]
cases = st.lists(st.tuples(st.sampled_from(ANSWERS), st.sampled_from(["yes", "no"])), min_size=1, max_size=30)


@given(cases, st.randoms())
def test_equals_the_official_script(rows, random):
    answers = [{"id": index, "text": text} for index, (text, _) in enumerate(rows)]
    labels = [{"id": index, "label": label} for index, (_, label) in enumerate(rows)]
    random.shuffle(answers)
    result = pope(answers, labels)
    summary = result["summary"]
    try:
        expected = official([text for text, _ in rows], [label for _, label in rows])
    except ZeroDivisionError:
        assert summary["degenerate"] and summary["f1"] == 0
        return
    assert not summary["degenerate"]
    for key, value in expected.items():
        assert summary[key] == pytest.approx(value), key
    assert result["mean_f1"] == summary["f1"]
    assert json.loads(json.dumps(result)) == result


def test_categories_and_their_mean():
    labels = [
        {"id": "a", "label": "yes", "category": "random"},
        {"id": "b", "label": "no", "category": "random"},
        {"id": "c", "label": "yes", "category": "popular"},
        {"id": "d", "label": "no", "category": "popular"},
    ]
    answers = [{"id": key, "text": text} for key, text in zip("abcd", ["Yes", "No", "Yes", "Yes"], strict=True)]
    result = pope(answers, labels)
    assert result["categories"]["random"]["f1"] == 1
    assert result["categories"]["popular"]["f1"] == pytest.approx(2 / 3)
    assert result["mean_f1"] == pytest.approx(5 / 6)
    assert result["summary"]["f1"] == pytest.approx(0.8)  # pooled is another number
    assert result["summary"]["yes_ratio"] == 0.75


def test_all_no_is_flagged():
    labels = [{"id": 1, "label": "yes"}, {"id": 2, "label": "no"}]
    summary = pope([{"id": 1, "text": "No"}, {"id": 2, "text": "No"}], labels)["summary"]
    assert (summary["precision"], summary["recall"], summary["f1"], summary["accuracy"]) == (0, 0, 0, 0.5)
    assert any("no answer is yes" in reason for reason in summary["degenerate"])
    assert pope([], [])["summary"]["degenerate"]


@pytest.mark.parametrize(
    ("answers", "labels", "message"),
    [
        ([{"id": 1, "text": "Yes"}], [{"id": 1, "label": "yes"}, {"id": 2, "label": "no"}], "no answer"),
        ([{"id": 1, "text": "Yes"}, {"id": 2, "text": "No"}], [{"id": 1, "label": "yes"}], "no label"),
        ([{"id": 1, "text": "Yes"}] * 2, [{"id": 1, "label": "yes"}], "twice"),
        ([{"id": 1, "text": "Yes"}], [{"id": 1, "label": "perhaps"}], "perhaps"),
        ([{"id": 1, "text": 3}], [{"id": 1, "label": "yes"}], "text"),
    ],
)
def test_mismatches_are_refused(answers, labels, message):
    with pytest.raises(UserError, match=message):
        pope(answers, labels)


@pytest.mark.skipif(not (SHARED / "data/pope").is_dir(), reason="needs the shared POPE files")
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_official_label_files(split):
    lines = (SHARED / f"data/pope/coco_pope_{split}.json").read_text().splitlines()
    labels = [{**json.loads(line), "id": json.loads(line)["question_id"]} for line in lines]
    texts = [ANSWERS[(index * 7 + len(label["text"])) % len(ANSWERS)] for index, label in enumerate(labels)]
    answers = [{"id": label["id"], "text": text} for label, text in zip(labels, texts, strict=True)]
    summary = pope(answers[::-1], labels)["summary"]
    assert summary["n"] == 3000 and summary["tp"] + summary["fn"] == 1500
    for key, value in official(texts, [label["label"] for label in labels]).items():
        assert summary[key] == pytest.approx(value), key
