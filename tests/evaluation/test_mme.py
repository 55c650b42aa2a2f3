"""MME against a plain reading of the official scorer's rule and files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.mme import TASKS, mme, parse
from m3po_jax.evaluation.registry import METRICS, intervals

responses = st.sampled_from(["Yes", "yes.", "No", "no", "None", "know", "eyes", "The answer is yes", "", "Y", " yes"])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes", "yes"),
        ("YES!", "yes"),
        ("eyes", "yes"),
        ("No.", "no"),
        ("know", "no"),
        ("None", "no"),
        ("Not sure", "no"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("The answer is yes", "other"),
        ("Y", "other"),
        ("", "other"),
        ("n yes", "other"),
    ],
)
def test_the_first_four_characters_decide(text, label):
    assert parse(text) == label


def official(lines):
    """(accuracy, accuracy+, other) of a task's (truth, response) lines, two to an image, by the published rule."""
    judged = []
    for truth, response in lines:
        head = response.lower()[:4]
        said = "yes" if "yes" in head else "no" if "no" in head else "other"
        judged.append((said == truth, said == "other"))
    right = [ok for ok, _ in judged]
    both = [right[i] and right[i + 1] for i in range(0, len(right), 2)]
    return sum(right) / len(right), sum(both) / len(both), sum(other for _, other in judged)


def records(tasks):
    answers, labels = [], []
    for task, lines in tasks.items():
        for number, (truth, response) in enumerate(lines):
            key = f"{task}-{number}"
            answers.append({"id": key, "text": response})
            labels.append({"id": key, "label": truth, "category": task, "image": f"{number // 2}.jpg"})
    return answers, labels


@given(st.data())
def test_scores_equal_the_official_rule(data):
    names = data.draw(st.lists(st.sampled_from(TASKS), min_size=1, unique=True))
    pair = st.tuples(st.tuples(st.just("yes"), responses), st.tuples(st.just("no"), responses))
    tasks = {name: sum(data.draw(st.lists(pair, min_size=1, max_size=5)), ()) for name in names}
    answers, labels = records(tasks)
    found = mme(data.draw(st.permutations(answers)), labels)
    sums = {"perception": 0.0, "cognition": 0.0}
    for name, lines in tasks.items():
        accuracy, plus, other = official(lines)
        task = found["categories"][name]
        assert (task["accuracy"], task["accuracy_plus"], task["other"]) == (accuracy, plus, other)
        assert task["score"] == pytest.approx(100 * accuracy + 100 * plus)
        sums["perception" if TASKS.index(name) < 10 else "cognition"] += task["score"]
    assert found["summary"]["perception"] == pytest.approx(sums["perception"])
    assert found["summary"]["cognition"] == pytest.approx(sums["cognition"])
    assert found["summary"]["tasks"] == len(names) and len(found["summary"]["degenerate"]) == 14 - len(names)


def test_perfect_answers_have_the_maxima():
    answers, labels = records({task: [("yes", "Yes"), ("no", "No")] for task in TASKS})
    summary = mme(answers, labels)["summary"]
    assert (summary["perception"], summary["cognition"], summary["other"]) == (2000, 800, 0)
    summary = mme([answer | {"text": "maybe"} for answer in answers], labels)["summary"]
    assert (summary["perception"], summary["cognition"], summary["other"]) == (0, 0, 28), "all other does not crash"


def test_images_need_two_questions_and_tasks_a_name():
    answers, labels = records({"count": [("yes", "Yes"), ("no", "No"), ("yes", "Yes")]})
    with pytest.raises(UserError, match=r"MME task count: 1 questions about image '1.jpg', not two"):
        mme(answers, labels)
    for change, message in (
        ({"category": "counting"}, "unknown task 'counting'"),
        ({"label": "maybe"}, "not yes or"),
    ):
        with pytest.raises(UserError, match=message):
            mme(answers[:1], [labels[0] | change])


def test_intervals_hold_the_score():
    rng = np.random.default_rng(0)
    said = [
        (truth, "yes" if (rng.random() < 0.7) == (truth == "yes") else "no")
        for _ in range(40)
        for truth in ("yes", "no")
    ]
    scored = mme(*records({"count": said, "text_translation": said[:20]}))
    images = [f"{item['category']}/{item['image']}" for item in scored["items"]]
    found = intervals(METRICS["mme"], scored["items"], images, 400, 0)
    for name in ("perception", "cognition"):
        low, high = found[name]
        assert 0 <= low < scored["summary"][name] < high <= 200
