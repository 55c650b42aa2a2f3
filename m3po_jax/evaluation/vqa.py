"""VQAv2 accuracy: a mean over the ten subsets that leave one annotator out (Antol et al., 2015; Goyal et al., 2017).

The official code normalises answers only where the annotators' answers are not all equal. A prediction of "Yes"
against ten times "yes" is therefore wrong (`official`). LLaVA lower-cases and normalises its predictions before it
submits them (`llava`); the published numbers are of that kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3po_jax.errors import UserError, nearest
from m3po_jax.evaluation.records import Record, join, mean, text_field
from m3po_jax.evaluation.short_answer import normalize

RULES = ("official", "llava")


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def accuracy(prediction: str, annotations: Sequence[str], rule: str = "official") -> float:
    """The mean over annotators of min(matches among the others / 3, 1), in [0, 1].

    Args:
        prediction: The answer as the model gave it.
        annotations: The annotators' answers, usually ten. Each counts by its place, so equal answers stay apart.
        rule: See the module.
    """
    said, truths = _plain(prediction), [_plain(text) for text in annotations]
    if rule == "llava":
        said = normalize(said)
    if len(set(truths)) > 1:
        said, truths = normalize(said), [normalize(text) for text in truths]
    matches = sum(text == said for text in truths)
    return sum(min((matches - (text == said)) / 3, 1.0) for text in truths) / len(truths)


def vqa(answers: Iterable[Record], labels: Iterable[Record], rule: str = "official") -> dict[str, Any]:
    """VQAv2 scores.

    Args:
        answers: ``{"id", "text"}``.
        labels: ``{"id", "answers"}``, a list of texts or of the official ``{"answer": text}``; ``category`` (the type
            of answer), ``question_type`` and ``image`` may be added.
        rule: ``official`` or ``llava``.

    Returns:
        ``summary`` (n, accuracy, the rule), ``categories`` by type of answer, ``question_types``, and ``items`` with
        an ``accuracy`` each; ``correct`` is an accuracy of at least one half.

    Raises:
        UserError: an unknown rule, ids that do not match, or answers that are no texts.
    """
    if rule not in RULES:
        raise UserError(f"unknown rule {rule!r}{nearest(rule, RULES)}", where="VQAv2")
    items: list[dict[str, Any]] = []
    for answer, label in join(answers, labels):
        text, truths = text_field(answer), _annotations(label)
        value = accuracy(text, truths, rule)
        items.append(
            {
                "id": str(label["id"]),
                "image": label.get("image"),
                "category": label.get("category") or "all",
                "question_type": label.get("question_type"),
                "text": text,
                "parsed": normalize(text),
                "answers": truths,
                "accuracy": value,
                "correct": value >= 0.5,
            }
        )
    return {
        "summary": {
            **_summary(items),
            "rule": rule,
            "degenerate": [] if items else ["there are no questions"],
        },
        "categories": _by(items, "category"),
        "question_types": _by([item for item in items if item["question_type"]], "question_type"),
        "items": items,
    }


def _annotations(label: Record) -> list[str]:
    found = label.get("answers")
    texts = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in found or ()]
    if not isinstance(found, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError("'answers' must be a list of the annotators' answers", where=f"id {label.get('id')!r}")
    return [str(text) for text in texts]


def _summary(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"n": len(items), "accuracy": mean(item["accuracy"] for item in items)}


def _by(items: Sequence[Mapping[str, Any]], field: str) -> dict[str, Any]:
    names = sorted({str(item[field]) for item in items})
    return {name: _summary([item for item in items if str(item[field]) == name]) for name in names}
