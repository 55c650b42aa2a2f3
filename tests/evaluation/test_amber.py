"""AMBER by the official arithmetic: exact answers, rounded F1, covered and flagged words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.amber import (
    GROUPS,
    discriminative,
    exact_similarity,
    generative,
    vocabulary_nouns,
)

KINDS = sorted({kind for kinds in GROUPS.values() for kind in kinds})
ASSOCIATION = {
    "dog": ["puppy"],
    "cat": ["kitten"],
    "grass": ["lawn", "ground"],
    "floor": ["ground"],
    "car": [],
    "sky": [],
}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["yes", "no"]), st.sampled_from(["Yes", "No", "no", "No.", ""]), st.sampled_from(KINDS)
        ),
        min_size=1,
        max_size=60,
    )
)
def test_discriminative_scores_equal_the_official_arithmetic(rows):
    answers = [{"id": i, "text": text} for i, (_, text, _) in enumerate(rows)]
    labels = [{"id": i, "label": truth, "category": kind} for i, (truth, _, kind) in enumerate(rows)]
    found = discriminative(answers, labels)
    correct = sum((truth, text) in {("yes", "Yes"), ("no", "No")} for truth, text, _ in rows)
    no, said, both = 0.001, 0.001, 0
    for truth, text, _ in rows:
        no, said, both = no + (truth == "no"), said + (text == "No"), both + (truth == "no" and text == "No")
    precision, recall = round(both / said * 100, 1), round(both / no * 100, 1)
    f1 = round(2 * (precision / 100) * (recall / 100) / (precision / 100 + recall / 100 + 0.0001) * 100, 1)
    summary = found["summary"]
    assert summary["accuracy"] == round(correct / (0.001 + len(rows)) * 100, 1)
    # The official denominators are summed up in floating point, which may turn a tie the other way.
    assert (summary["precision"], summary["recall"], summary["f1"]) == pytest.approx(
        (precision, recall, f1), abs=0.11
    )
    assert summary["unparsed"] == sum(text not in ("Yes", "No") for _, text, _ in rows)


def test_no_is_the_positive_class_and_existence_has_its_own_epsilon():
    answers = [{"id": i, "text": "No" if i < 10 else "Yes"} for i in range(20)]
    for kind, group, f1 in (
        ("discriminative-hallucination", "existence", 66.6),  # 2·1·0.5 / (1.5 + 0.001)
        ("relation", "relation", 66.7),
        ("discriminative-attribute-state", "attribute", 66.7),
    ):
        labels = [{"id": i, "label": "no", "category": kind} for i in range(20)]
        scores = discriminative(answers, labels)["categories"][group]
        assert (scores["accuracy"], scores["precision"], scores["recall"]) == (50.0, 100.0, 50.0)
        assert scores["f1"] == f1
    one = [{"id": 0, "label": "no", "category": "discriminative-attribute-state"}]
    scores = discriminative(answers[:1], one)["categories"]
    assert scores["state"]["accuracy"] == 99.9 and scores["attribute"]["accuracy"] == 99.7
    yes = {"id": 0, "label": "yes", "category": "relation"}
    scores = discriminative([{"id": 0, "text": "Yes"}], [yes])["summary"]
    assert scores["f1"] == 0 and len(scores["degenerate"]) == 2
    with pytest.raises(UserError, match="unknown type 'existence'"):
        discriminative([{"id": 0, "text": "Yes"}], [yes | {"category": "existence"}])


def describe(nouns, truth=("dog", "grass"), hallu=("cat", "car"), similarity=exact_similarity, safe=("sky",)):
    record = {"id": "x", "text": " ".join(nouns), "truth": list(truth), "hallu": list(hallu)}
    split = {"nouns": str.split, "similarity": similarity}
    return generative([record], ASSOCIATION, safe, **split)["items"][0]


def test_words_are_covered_named_or_flagged():
    item = describe(["puppy", "lawn", "cat", "kitten", "car", "sky", "floor", "table"])
    assert item["mentions"] == ["puppy", "lawn", "cat", "kitten", "car", "sky", "floor"], "a table is in no list"
    assert item["found"] == ["dog", "grass"] and item["named"] == ["cat", "car"]
    assert item["hallucinated"] == ["cat", "kitten", "car", "floor"], (
        "repeats and words of no list of the image count"
    )


def test_a_word_of_two_objects_covers_the_first_only():
    assert describe(["ground"], truth=("floor", "grass"))["found"] == ["floor"]
    assert describe(["ground"], truth=("grass", "floor"))["found"] == ["grass"]


def test_likeness_forgives_even_hallucinated_objects():
    def alike(first, second):
        return 0.81 if {first, second} == {"cat", "dog"} else float(first == second)

    item = describe(["cat"], similarity=alike)
    assert (item["hallucinated"], item["found"], item["named"]) == ([], ["dog"], ["cat"])
    item = describe(["cat"], similarity=lambda a, b: 0.8)
    assert item["hallucinated"] == ["cat"], "more than 0.8, not 0.8"


def test_generative_rates():
    records = [
        {"id": 1, "text": "dog cat", "truth": ["dog", "grass"], "hallu": ["cat", "car"]},
        {"id": 2, "text": "dog", "truth": ["dog"], "hallu": []},
        {"id": 3, "text": "nothing here", "truth": ["dog"], "hallu": ["car"]},
    ]
    split = {"nouns": str.split, "similarity": exact_similarity}
    summary = generative(records, ASSOCIATION, [], **split)["summary"]
    assert summary["chair"] == 33.3 and summary["cover"] == 50.0 and summary["cog"] == 33.3
    assert summary["hal"] == 33.4, "100 minus the share of clean descriptions, whose denominator starts at 0.001"
    with pytest.raises(UserError, match="does not have 'unicorn'"):
        generative([{"id": 1, "text": "", "truth": ["unicorn"], "hallu": []}], ASSOCIATION, [], **split)
    with pytest.raises(UserError, match="'hallu' must be a list"):
        generative([{"id": 1, "text": "", "truth": []}], ASSOCIATION, [], **split)


def test_words_of_the_association_file_stand_in_for_a_tagger():
    assert vocabulary_nouns(ASSOCIATION)("Two puppies, Dogs and a lawn.") == [
        "two",
        "puppy",
        "dog",
        "and",
        "a",
        "lawn",
    ]
