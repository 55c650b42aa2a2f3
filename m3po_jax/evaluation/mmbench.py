"""MMBench: multiple choice under rotated options, scored without a judge (Liu et al., arXiv:2307.06281).

Rows of one question are its rotations, of index ``index + k·10⁶``. Circular: a question counts only if every rotation
is right. An answer is read by a rule of `letters`, and not by a judge; what states neither a letter nor an option's
text is wrong here, so scores are a little lower than with a judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.evaluation import letters
from m3po_jax.evaluation.metric import (
    Answers,
    Column,
    Item,
    Metric,
    Rates,
    Sums,
    as_label,
    needs_all,
    needs_metadata,
    needs_reference,
    ratio,
    values,
)
from m3po_jax.evaluation.records import Record, join, mean, text_field

ROTATION = 1_000_000


def mmbench(answers: Iterable[Record], labels: Iterable[Record], rule: str = "stated") -> dict[str, Any]:
    """MMBench scores.

    Args:
        answers: ``{"id", "text"}``.
        labels: ``{"id", "label", "options"}``: the right letter and ``{letter: text}``; ``index`` (an integer;
            default: the id), ``category`` and ``image`` may be added.
        rule: Of `letters.RULES`.

    Returns:
        ``summary``: n (rows), questions, ``accuracy`` (circular), ``single_accuracy`` (of the unrotated rows),
        ``row_accuracy``, unparsed; ``categories``: circular accuracy of each; ``items``, one a row, each with its
        ``question`` and whether that counts.

    Raises:
        UserError: ids that do not match, an index that is no integer, or a label that is no option.
    """
    items: list[dict[str, Any]] = []
    for answer, label in join(answers, labels):
        text, where = text_field(answer), f"id {label.get('id')!r}"
        options, truth = _options(label.get("options")), str(label.get("label") or "").strip().upper()
        if truth not in options:
            raise UserError(f"the label {truth!r} is none of the options", where=where)
        try:
            index = int(label.get("index", label["id"]))
        except (TypeError, ValueError):
            raise UserError("the index is no integer", where=where, remedy="rotations are index + k·10^6") from None
        parsed = letters.RULES[rule](text, options)
        items.append(
            {
                "id": str(label["id"]),
                "image": label.get("image"),
                "category": label.get("category") or "all",
                "question": index % ROTATION,
                "rotation": index // ROTATION,
                "text": text,
                "parsed": parsed,
                "label": truth,
                "correct": parsed == truth,
            }
        )
    passed: dict[int, bool] = {}
    for item in items:
        passed[item["question"]] = passed.get(item["question"], True) and item["correct"]
    counted: set[int] = set()
    for item in items:
        # Whether its question counts, noted in all rows of it, and which of them stands for it.
        item["circular"], item["stands"] = passed[item["question"]], item["question"] not in counted
        counted.add(item["question"])
    numbers = values(sums, rates, items)
    names = sorted({item["category"] for item in items})
    return {
        "summary": {
            "n": len(items),
            "questions": len(passed),
            **{name: numbers.get(name) for name in ("accuracy", "single_accuracy", "row_accuracy")},
            "unparsed": sum(item["parsed"] is None for item in items),
            "degenerate": [] if items else ["there are no questions"],
        },
        "categories": {name: _circular([item for item in items if item["category"] == name]) for name in names},
        "items": items,
    }


def _options(options: Any) -> dict[str, str]:
    """Letters, in capitals, and texts, without those that a table leaves empty (null, NaN, "")."""
    if not isinstance(options, Mapping):
        return {}
    texts = {str(letter).strip().upper(): option for letter, option in options.items()}
    empty = ("", "nan", "none")
    return {letter: str(text).strip() for letter, text in texts.items() if str(text).strip().lower() not in empty}


def sums(item: Item) -> list[float]:
    """What a row adds: whether its question counts, and 1, once a question; the same of unrotated rows and of all."""
    once, plain, correct = bool(item["stands"]), item["rotation"] == 0, bool(item["correct"])
    return [once and item["circular"], once, plain and correct, plain, correct, 1]


def rates(sums: Sums) -> Rates:
    """Circular accuracy, that of the unrotated rows, and that of all rows, from `sums`."""
    names = ("accuracy", "single_accuracy", "row_accuracy")
    return {name: ratio(sums[..., 2 * i], sums[..., 2 * i + 1]) for i, name in enumerate(names)}


def _circular(items: Sequence[Item]) -> dict[str, Any]:
    questions = {item["question"]: item["circular"] for item in items}
    return {"questions": len(questions), "accuracy": mean(questions.values())}


def _score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    labels = [
        as_label(p, label=p.reference, options=p.metadata["options"], index=p.metadata.get("index", p.id))
        for p in prompts
    ]
    return mmbench(answers, labels, rule)


METRIC = Metric(
    rules={
        "stated": "m3po_jax's own: the letter that the answer states, wherever it stands, else the text it repeats",
        "vlmevalkit": "can_infer of VLMEvalKit (2025): a letter among the last five words, else an option's text",
    },
    needs="`reference` (a letter), `metadata.options` ({letter: text}), `metadata.index`",
    missing=needs_all(needs_reference, needs_metadata("options", dict)),
    score=_score,
    sums=sums,
    rates=rates,
    columns=(
        Column("accuracy", "Circular", "higher", "share of the questions whose rotations are all right (%)"),
        Column("single_accuracy", "Single", "higher", "share of the unrotated questions that are right (%)"),
    ),
    deciding=("accuracy",),
)
