"""CHAIR against hand-computed captions and the published scores of real captions."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.chair import chair, coco_vocabulary, singular, summarize, vocabulary

SHARED = Path(os.environ.get("M3PO_SHARED", Path(__file__).parents[2] / "../shared"))
WORDS = vocabulary(
    {
        "person": ["man", "woman"],
        "dog": ["puppy"],
        "hot dog": [],
        "traffic light": ["stop light"],
        "knife": [],
        "scissors": [],
        "glass": [],
        "bus": [],
    }
)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dogs", "dog"),
        ("buses", "bus"),
        ("glasses", "glass"),
        ("benches", "bench"),
        ("knives", "knife"),
        ("puppies", "puppy"),
        ("policemen", "policeman"),
        ("people", "person"),
        ("ties", "tie"),
        ("bus", "bus"),
        ("grass", "grass"),
        ("is", "is"),
        ("boxes", "box"),
        ("potatoes", "potato"),
        ("houses", "house"),
    ],
)
def test_singular(word, expected):
    assert singular(word) == expected


def test_mentions_merge_the_longest_term_first():
    text = "Two men eat hot dogs; a puppy's near the TRAFFIC LIGHTS, scissors and glasses. No dog-house, bus!"
    assert WORDS.mentions(text) == ["person", "hot dog", "dog", "traffic light", "scissors", "glass", "bus"]
    assert WORDS.mentions("") == WORDS.mentions("a lovely day.") == []


def test_hand_computed_example():
    records = [
        {
            "id": 1,
            "text": "A man and a dog and a dog.",
            "objects": ["person"],
            "tokens": 8,
        },  # dog twice: 2 of 3
        {"id": 2, "text": "A bus.", "objects": ["bus", "knife", "dog"], "tokens": 3},  # 0 of 1, finds 1 of 3
        {"id": 3, "text": "Nothing here.", "objects": ["glass"], "tokens": 3},
    ]
    result = chair(records, WORDS)
    summary = result["summary"]
    assert summary["chair_i"] == pytest.approx(2 / 4)
    assert summary["chair_s"] == pytest.approx(1 / 3)
    assert summary["recall"] == pytest.approx(2 / 5)
    assert summary["f1"] == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    assert summary["mean_tokens"] == pytest.approx(14 / 3) and summary["mean_words"] == pytest.approx(4)
    assert summary["mean_objects"] == pytest.approx(4 / 3)
    assert summary["captions_without_objects"] == 1 and summary["top_hallucinated"] == [["dog", 2]]
    assert summary["degenerate"] == []
    assert result["items"][0]["hallucinated"] == ["dog", "dog"]
    assert json.loads(json.dumps(result)) == result


def test_degenerate_cases():
    silent = chair([{"id": 1, "text": "Nice.", "objects": ["dog"]}], WORDS)["summary"]
    assert (silent["chair_i"], silent["f1"], silent["recall"], silent["chair_s"]) == (None, None, 0, 0)
    assert silent["mean_tokens"] is None and len(silent["degenerate"]) == 1
    empty = chair([{"id": 1, "text": "A dog.", "objects": []}], WORDS)["summary"]
    assert (empty["chair_i"], empty["recall"], empty["f1"]) == (1, None, None) and empty["degenerate"]
    wrong = chair([{"id": 1, "text": "A dog.", "objects": ["bus"]}], WORDS)["summary"]
    assert (wrong["chair_i"], wrong["recall"], wrong["f1"]) == (1, 0, 0) and wrong["degenerate"]
    nothing = chair([], WORDS)["summary"]
    assert nothing["n"] == 0 and nothing["chair_s"] is None and nothing["degenerate"]


@pytest.mark.parametrize(
    "records",
    [
        [{"id": 1, "text": "a", "objects": ["dog"]}, {"id": "1", "text": "b", "objects": ["dog"]}],
        [{"text": "a", "objects": ["dog"]}],
        [{"id": 1, "text": None, "objects": ["dog"]}],
        [{"id": 1, "text": "a", "objects": ["cat"]}],
        [{"id": 1, "text": "a", "objects": "dog"}],
    ],
)
def test_bad_records(records):
    with pytest.raises(UserError):
        chair(records, WORDS)


def test_ambiguous_vocabulary():
    with pytest.raises(UserError, match="stands for"):
        vocabulary({"car": ["vehicle"], "bus": ["vehicle"]})
    with pytest.raises(UserError, match="no words"):
        vocabulary({"car": ["?"]})


names = st.lists(st.sampled_from(sorted(WORDS.objects)), max_size=6)


@given(st.lists(st.tuples(names, names), min_size=1, max_size=6))
def test_bounds_and_additivity(cases):
    records = [{"id": index, "text": " , ".join(said), "objects": true} for index, (said, true) in enumerate(cases)]
    result = chair(records, WORDS)
    summary = result["summary"]
    assert summary["mentions"] == sum(len(said) for said, _ in cases)
    assert summary["hallucinated_mentions"] == sum(name not in true for said, true in cases for name in said)
    for key in ("chair_i", "chair_s", "recall", "f1"):
        assert summary[key] is None or 0 <= summary[key] <= 1
    halves = [summarize(result["items"][:1]), summarize(result["items"][1:])]
    assert sum(half["mentions"] for half in halves) == summary["mentions"]
    assert summarize(result["items"][::-1]) == summary


COCO_LINES = ["bus, minibus", "chair, seat", "toilet", "tie", "motorcycle, scooter,  motor bike", "train"]


def test_coco_rules():
    words = coco_vocabulary(COCO_LINES, {"bow tie": "tie", "passenger train": "train", "train track": "train track"})
    assert words.mentions("A bow tie and a passenger train on a train track") == ["tie", "train"]
    assert words.mentions("a seat") == ["chair"]
    assert words.mentions("a seat by the toilet") == ["toilet"]
    assert words.mentions("one bus, two buses") == ["bus"]


@pytest.mark.skipif(not (SHARED / "data/pope/captions").is_dir(), reason="needs the shared POPE captions")
@pytest.mark.parametrize("name", ["llava_i1_short", "llava_i2_brief", "mplug_owl_i1_short", "mplug_owl_i2_brief"])
def test_published_coco_scores(name):
    data = SHARED / "data"
    words = coco_vocabulary(
        (data / "coco/synonyms.txt").read_text().splitlines(),
        json.loads((data / "coco/double_words.json").read_text()),
    )
    with gzip.open(data / "coco/objects_2014.json.gz") as file:
        truth = json.load(file)
    truth = truth.get("objects", truth)
    lines = (data / f"pope/captions/{name}.jsonl").read_text().splitlines()
    captions = [json.loads(line) for line in lines]
    records = [
        {"id": row["image_id"], "text": row["caption"], "objects": truth[str(row["image_id"])]} for row in captions
    ]
    summary = chair(records, words)["summary"]
    expected = json.loads((data / "pope/captions/expected.json").read_text())["files"][f"{name}.jsonl"]
    official = expected["official_rule"]
    # The official counts come from NLTK and pattern's lemmatiser; ours from a few suffix rules.
    assert abs(summary["mentions"] - official["mentions"]) <= 0.001 * official["mentions"]
    assert summary["chair_i"] * 100 == pytest.approx(official["chair_i"], abs=0.03)
    assert summary["chair_s"] * 100 == pytest.approx(official["chair_s"], abs=0.1)
    assert summary["recall"] * 100 == pytest.approx(official["recall"], abs=0.1)
