"""VQAv2 accuracy: a mean over the ten subsets that leave one annotator out (Antol et al., 2015; Goyal et al., 2017).

The official code normalises answers only where the annotators' answers are not all equal. A prediction of "Yes"
against ten times "yes" is therefore wrong (`official`). LLaVA normalises its predictions before it submits them, in a
way of its own (`llava`, see `short_answer.llava_normalize`); the published numbers are of that kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.evaluation.metric import Answers, Column, Item, Metric, as_label, needs_metadata, values
from m3po_jax.evaluation.records import Record, join, text_field
from m3po_jax.evaluation.short_answer import llava_normalize, normalize, rates


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
        said = llava_normalize(said)
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
        ``summary`` (n, accuracy), ``categories`` by type of answer, ``question_types``, and ``items`` with
        an ``accuracy`` each; ``correct`` is an accuracy of at least one half.

    Raises:
        UserError: ids that do not match, or answers that are no texts.
    """
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
                "parsed": llava_normalize(text) if rule == "llava" else normalize(text),
                "answers": truths,
                "accuracy": value,
                "correct": value >= 0.5,
            }
        )
    return {
        "summary": {
            **_summary(items),
            "degenerate": [] if items else ["there are no questions"],
        },
        "categories": _by(items, "category"),
        "question_types": _by([item for item in items if item["question_type"]], "question_type"),
        "items": items,
    }


def _annotations(label: Record) -> list[str]:
    entries = label.get("answers")
    texts = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in entries or ()]
    if not isinstance(entries, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError("'answers' must be a list of the annotators' answers", where=f"id {label.get('id')!r}")
    return [str(text) for text in texts]


def sums(item: Item) -> list[float]:
    """What an answer adds: its accuracy, and 1."""
    return [item["accuracy"], 1]


def _summary(items: Sequence[Item]) -> dict[str, Any]:
    return {"n": len(items), "accuracy": values(sums, rates, items).get("accuracy")}


def _by(items: Sequence[Mapping[str, Any]], field: str) -> dict[str, Any]:
    names = sorted({str(item[field]) for item in items})
    return {name: _summary([item for item in items if str(item[field]) == name]) for name in names}


def _score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    more = ("answers", "question_type")
    return vqa(answers, [as_label(p, **{name: p.metadata.get(name) for name in more}) for p in prompts], rule)


METRIC = Metric(
    rules={
        "official": "vqaEval.py of GT-Vision-Lab/VQA: normalised only where annotators differ",
        "llava": "official, on predictions normalised by LLaVA's convert_vqav2_for_submission.py",
    },
    needs="`metadata.answers`, ten texts",
    missing=needs_metadata("answers", list),
    score=_score,
    sums=sums,
    rates=rates,
    columns=(Column("accuracy", "Acc", "higher", "share of right answers (%)"),),
    deciding=("accuracy",),
)
