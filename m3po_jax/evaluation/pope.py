"""POPE: does the model say yes when asked for an object that is not there? (Li et al., 2023)

The official rule: cut the answer at the first full stop, delete commas, split at single spaces, and read "no"
if one of the words is exactly No, no or not; everything else is "yes", ``NO``, ``No!`` and the empty answer
included. Answers that count as "yes" without saying so are reported as `unparsed`, and scored by the rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.evaluation import yes_no
from m3po_jax.evaluation.metric import Answers, Column, Item, Metric, Rates, Sums, as_label, needs_reference, ratio
from m3po_jax.evaluation.records import Record, mean, yes_no_items

NEAR_CHANCE = 0.6  # accuracy of the base below which differences between systems mean little

_YES = re.compile(r"\byes\b", re.IGNORECASE)


def parse(text: str) -> str:
    """``no`` or ``yes`` by the official rule."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def is_unparsed(text: str) -> bool:
    """True where the rule falls back to "yes" although the answer does not say yes."""
    return parse(text) == "yes" and not _YES.search(text)


# How a rule reads an answer, and whether it found neither yes nor no.
_READERS: dict[str, tuple[Callable[[str], str], Callable[[str], bool]]] = {
    "official": (parse, is_unparsed),
    "lmms_eval": (yes_no.lmms_eval_pope, lambda text: yes_no.lmms_eval_pope(text) == yes_no.OTHER),
    "vlmevalkit": (yes_no.vlmevalkit, lambda text: yes_no.vlmevalkit(text) == yes_no.UNKNOWN),
}


def pope(answers: Iterable[Record], labels: Iterable[Record], rule: str = "official") -> dict[str, Any]:
    """POPE scores.

    Args:
        answers: ``{"id", "text"}``.
        rule: Of `METRIC.rules`.
        labels: ``{"id", "label"}``, yes or no; ``category`` (the split) and ``image`` may be added.

    Returns:
        ``summary`` over all questions (`scores`), ``categories``: the same for each, ``mean_f1`` and
        ``mean_accuracy``: means over the categories, LLaVA's headline; ``items``: one record a question.

    Raises:
        UserError: when ids do not match, or a label or answer is malformed.
    """
    items = yes_no_items(answers, labels, *_READERS[rule])
    names = sorted({item["category"] for item in items})
    categories = {name: scores([item for item in items if item["category"] == name]) for name in names}
    return {
        "summary": scores(items),
        "categories": categories,
        "mean_f1": mean(row["f1"] for row in categories.values()),
        "mean_accuracy": mean(row["accuracy"] for row in categories.values()),
        "items": items,
    }


def sums(item: Item) -> list[float]:
    """What an answer adds: true and false positives, true and false negatives (positive = yes), and answers that are
    wrong without being any of them.

    To VLMEvalKit an answer that is neither yes nor no is a missed yes where yes was right; to lmms-eval it is none.
    """
    said, correct = item["parsed"], bool(item["correct"])
    missed = said == "no" or (said == yes_no.UNKNOWN and item["label"] == "yes")
    cells = [
        said == "yes" and correct,
        said == "yes" and not correct,
        said == "no" and correct,
        missed and not correct,
    ]
    return [*cells, not any(cells)]


def rates(sums: Sums) -> Rates:
    """POPE's scores from `sums`; 0 where a denominator is zero."""
    tp, fp, tn, fn, neither = np.moveaxis(sums, -1, 0)
    total = tp + fp + tn + fn + neither
    return {
        "accuracy": ratio(tp + tn, total, undefined=0.0),
        "precision": ratio(tp, tp + fp, undefined=0.0),
        "recall": ratio(tp, tp + fn, undefined=0.0),
        # Equal to 2PR/(P+R), and defined whenever either is.
        "f1": ratio(2 * tp, 2 * tp + fp + fn, undefined=0.0),
        "yes_ratio": ratio(tp + fp, total, undefined=0.0),
    }


def scores(items: Sequence[Item]) -> dict[str, Any]:
    """`rates`, the four counts and the number of unparsed answers.

    Where a denominator is zero the score is 0 and `degenerate` says so; without items accuracy and yes ratio
    are 0 as well.
    """
    totals = np.sum([sums(item) for item in items] or [[0, 0, 0, 0, 0]], axis=0)
    tp, fp, tn, fn, _ = map(int, totals)
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
        **{key: float(value) for key, value in rates(totals).items()},
        **{"tp": tp, "fp": fp, "tn": tn, "fn": fn},
        "unparsed": sum(bool(item["unparsed"]) for item in items),
        "degenerate": reasons,
    }


def near_chance(base: Mapping[str, float | None]) -> str | None:
    """Of yes/no questions: the base hardly answers better than a coin."""
    accuracy = base.get("accuracy")
    if accuracy is None or accuracy >= NEAR_CHANCE:
        return None
    return f"the base answers {accuracy:.0%} right, near chance; differences between systems mean little there"


def _score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    return pope(answers, [as_label(prompt, label=prompt.reference) for prompt in prompts], rule)


METRIC = Metric(
    rules={
        "official": "evaluate.py of RUCAIBox/POPE: no, if No, no or not is a word of the first sentence, else yes",
        "lmms_eval": "tasks/pope/utils.py of lmms-eval (2025): the whole answer is yes or no, case aside",
        "vlmevalkit": yes_no.VLMEVALKIT,
    },
    needs="`reference` Yes or No",
    missing=needs_reference,
    score=_score,
    sums=sums,
    rates=rates,
    columns=(
        Column("accuracy", "Acc", "higher", "share of right answers (%)"),
        Column("f1", "F1", "higher", "harmonic mean of precision and recall (%)"),
        Column("yes_ratio", "Yes", None, "share of the answers that say yes (%)"),
    ),
    deciding=("accuracy",),
    gate=near_chance,
)
