"""POPE: does the model say yes when asked for an object that is not there? (Li et al., 2023)

The official rule: cut the answer at the first full stop, delete commas, split at single spaces, and read "no"
if one of the words is exactly No, no or not; everything else is "yes", ``NO``, ``No!`` and the empty answer
included. Answers that count as "yes" without saying so are reported as `unparsed`, and scored by the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3po_jax.evaluation.records import Record, mean, ratio, yes_no_items

_YES = re.compile(r"\byes\b", re.IGNORECASE)


def parse(text: str) -> str:
    """``no`` or ``yes`` by the official rule."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def is_unparsed(text: str) -> bool:
    """True where the rule falls back to "yes" although the answer does not say yes."""
    return parse(text) == "yes" and not _YES.search(text)


def pope(answers: Iterable[Record], labels: Iterable[Record]) -> dict[str, Any]:
    """POPE scores.

    Args:
        answers: ``{"id", "text"}``.
        labels: ``{"id", "label"}``, yes or no; ``category`` (the split) and ``image`` may be added.

    Returns:
        ``summary`` over all questions (`scores`), ``categories``: the same for each, ``mean_f1`` and
        ``mean_accuracy``: means over the categories, LLaVA's headline; ``items``: one record a question.

    Raises:
        UserError: when ids do not match, or a label or answer is malformed.
    """
    items = yes_no_items(answers, labels, parse, is_unparsed)
    names = sorted({item["category"] for item in items})
    categories = {name: scores([item for item in items if item["category"] == name]) for name in names}
    return {
        "summary": scores(items),
        "categories": categories,
        "mean_f1": mean(row["f1"] for row in categories.values()),
        "mean_accuracy": mean(row["accuracy"] for row in categories.values()),
        "items": items,
    }


def scores(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 (positive = yes), yes ratio, confusion and unparsed counts of items.

    Where a denominator is zero the score is 0 and `degenerate` says so; without items accuracy and yes ratio
    are 0 as well.
    """
    counts = {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
    for item in items:
        positive = item["parsed"] == "yes"
        counts[("t" if item["correct"] else "f") + ("p" if positive else "n")] += 1
    tp, fp, tn, fn = counts["tp"], counts["fp"], counts["tn"], counts["fn"]
    n = len(items)
    reasons = []
    if not n:
        reasons.append("there are no questions")
    elif not tp + fp:
        reasons.append("no answer is yes: precision and f1 are set to 0")
    if n and not tp + fn:
        reasons.append("no label is yes: recall and f1 are set to 0")
    if n and tp + fp and tp + fn and not tp:
        reasons.append("no yes is right: f1 is set to 0")
    return {
        "n": n,
        "accuracy": ratio(tp + tn, n) or 0.0,
        "precision": ratio(tp, tp + fp) or 0.0,
        "recall": ratio(tp, tp + fn) or 0.0,
        # Equal to 2PR/(P+R), and defined whenever either is.
        "f1": ratio(2 * tp, 2 * tp + fp + fn) or 0.0,
        "yes_ratio": ratio(tp + fp, n) or 0.0,
        **counts,
        "unparsed": sum(bool(item["unparsed"]) for item in items),
        "degenerate": reasons,
    }
