"""MME: two yes/no questions about each image, in fourteen tasks (Fu et al., arXiv:2306.13394).

The official rule: the answer is lower-cased and not stripped; "yes" in its first four characters is yes, else "no"
there is no, else the answer is other, which is wrong. A task's score is 100·accuracy + 100·accuracy⁺, where accuracy⁺
is the share of images with both questions right; perception (ten tasks, at most 2,000) and cognition (four, at most
800) are sums of scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.evaluation import yes_no
from m3po_jax.evaluation.metric import (
    Answers,
    Column,
    Item,
    Metric,
    Rates,
    Sums,
    as_label,
    needs_reference,
    ratio,
    values,
)
from m3po_jax.evaluation.records import Record, yes_no_items

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)
OTHER = "other"


def parse(text: str) -> str:
    """``yes``, ``no`` or ``other`` by the official rule."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else OTHER


_READERS = {"official": parse, "lmms_eval": yes_no.lmms_eval_mme, "vlmevalkit": yes_no.vlmevalkit}


def mme(answers: Iterable[Record], labels: Iterable[Record], rule: str = "official") -> dict[str, Any]:
    """MME scores.

    Args:
        answers: ``{"id", "text"}``.
        rule: Of `METRIC.rules`.
        labels: ``{"id", "label", "category", "image"}``: yes or no, the task, and the image, which two questions of a
            task share.

    Returns:
        ``summary``: n, ``perception`` and ``cognition`` (sums over the tasks that are there), ``accuracy``,
        ``other``, ``tasks`` (how many are there) and ``degenerate``; ``categories``: n, accuracy, accuracy_plus,
        score (at most 200) and other of each task; ``items``.

    Raises:
        UserError: ids that do not match, an unknown task, a label that is neither yes nor no, or an image without
            exactly two questions.
    """
    read = _READERS[rule]
    neither = lambda text: read(text) not in ("yes", "no")  # noqa: E731
    items = yes_no_items(answers, labels, read, neither, categories=TASKS, kind="task")
    present = [task for task in TASKS if any(item["category"] == task for item in items)]
    for task in present:
        _pair([item for item in items if item["category"] == task])
    numbers = values(sums, rates, items)
    return {
        "summary": {
            "n": len(items),
            "perception": numbers.get("perception", 0),
            "cognition": numbers.get("cognition", 0),
            "accuracy": numbers.get("accuracy"),
            "other": sum(item["unparsed"] for item in items),
            "tasks": len(present),
            "degenerate": [f"no question of {task}" for task in TASKS if task not in present],
        },
        "categories": {task: task_scores([item for item in items if item["category"] == task]) for task in present},
        "items": items,
    }


def _pair(items: Sequence[dict[str, Any]]) -> None:
    """Notes in each item of a task whether ``both`` questions of its image are right.

    Raises:
        UserError: an image does not have two questions.
    """
    pairs: dict[str, list[bool]] = {}
    for item in items:
        pairs.setdefault(str(item["image"]), []).append(bool(item["correct"]))
    uneven = sorted(image for image, right in pairs.items() if len(right) != 2)
    if uneven:
        raise UserError(
            f"{len(pairs[uneven[0]])} questions about image {uneven[0]!r}, not two",
            where=f"MME task {items[0]['category']}",
            remedy="accuracy+ needs both questions of every image",
        )
    for item in items:
        item["both"] = all(pairs[str(item["image"])])


def sums(item: Item) -> list[float]:
    """What an answer adds to its task: right answers, images with both right (half of one each), questions."""
    added = np.zeros((len(TASKS), 3))
    added[TASKS.index(item["category"])] = bool(item["correct"]), 0.5 * bool(item["both"]), 1
    return added.ravel().tolist()


def rates(sums: Sums) -> Rates:
    """The two sums over tasks of 100·accuracy + 100·accuracy⁺, where absent ones add nothing, and all accuracy."""
    correct, plus, questions = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    # An image is half of its two questions' sum.
    scores = 100 * ratio(correct, questions, undefined=0.0) + 100 * ratio(plus, questions / 2, undefined=0.0)
    perception = len(PERCEPTION)
    return {
        "perception": scores[..., :perception].sum(axis=-1),
        "cognition": scores[..., perception:].sum(axis=-1),
        "accuracy": ratio(correct.sum(axis=-1), questions.sum(axis=-1)),
    }


def task_scores(items: Sequence[Item]) -> dict[str, Any]:
    """Scores of one task's items: accuracy, accuracy⁺ (images with both questions right) and their sum in percent."""
    totals = np.sum([sums(item) for item in items], axis=0)
    place = 3 * TASKS.index(items[0]["category"])
    correct, plus, questions = totals[place : place + 3].tolist()
    accuracy, accuracy_plus = correct / questions, plus / (questions / 2)
    return {
        "n": len(items),
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "score": 100 * accuracy + 100 * accuracy_plus,
        "other": sum(item["unparsed"] for item in items),
    }


def _score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    return mme(answers, [as_label(prompt, label=prompt.reference) for prompt in prompts], rule)


METRIC = Metric(
    rules={
        "official": "eval_tool/calculation.py of MME: yes or no within the first four characters, in lower case",
        "lmms_eval": "tasks/mme/utils.py of lmms-eval (2025): official without full stops and outer spaces; y and n",
        "vlmevalkit": yes_no.VLMEVALKIT,
    },
    needs="`reference` Yes or No, `metadata.category` (the task), `metadata.image`, which two rows share",
    missing=needs_reference,
    score=_score,
    sums=sums,
    rates=rates,
    columns=(
        Column("perception", "Perception", "higher", "sum of ten tasks' scores, at most 2,000", 1, False),
        Column("cognition", "Cognition", "higher", "sum of four tasks' scores, at most 800", 1, False),
    ),
    deciding=("perception",),
)
