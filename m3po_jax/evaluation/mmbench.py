"""MMBench: multiple choice under rotated options, scored without a judge (Liu et al., arXiv:2307.06281).

Rows of one question are its rotations, of index ``index + k·10⁶``. Circular: a question counts only if every rotation
is right. An answer is read by rule, and not by a judge: one option letter among its words, else one option's text in
it; anything else is wrong here, so scores are a little lower than with a judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.evaluation.records import Record, join, mean, text_field

ROTATION = 1_000_000
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def parse(text: str, options: Mapping[str, str]) -> str | None:
    """The option's letter that an answer gives, None where it gives none or several.

    "A" in an answer of more than three words is taken for the article, and then only an option's text decides.
    """
    words = text.translate(_PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not (letters[0] == "A" and len(words) > 3):
        return letters[0]
    lowered = text.lower()
    named = [letter for letter, option in options.items() if option and option.lower() in lowered]
    return named[0] if len(named) == 1 else None


def mmbench(answers: Iterable[Record], labels: Iterable[Record]) -> dict[str, Any]:
    """MMBench scores.

    Args:
        answers: ``{"id", "text"}``.
        labels: ``{"id", "label", "options"}``: the right letter and ``{letter: text}``; ``index`` (an integer;
            default: the id), ``category`` and ``image`` may be added.

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
        options, truth = label.get("options"), str(label.get("label") or "").strip().upper()
        if not isinstance(options, Mapping) or truth not in options:
            raise UserError(f"the label {truth!r} is none of the options", where=where)
        try:
            index = int(label.get("index", label["id"]))
        except (TypeError, ValueError):
            raise UserError("the index is no integer", where=where, remedy="rotations are index + k·10^6") from None
        parsed = parse(text, {str(letter): str(option) for letter, option in options.items() if option is not None})
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
    counts = Counter(item["question"] for item in items)
    for item in items:
        item["circular"], item["rotations"] = passed[item["question"]], counts[item["question"]]
    first = [item for item in items if item["rotation"] == 0]
    names = sorted({item["category"] for item in items})
    return {
        "summary": {
            "n": len(items),
            "questions": len(passed),
            "accuracy": mean(passed.values()),
            "single_accuracy": mean(item["correct"] for item in first),
            "row_accuracy": mean(item["correct"] for item in items),
            "unparsed": sum(item["parsed"] is None for item in items),
            "degenerate": [] if items else ["there are no questions"],
        },
        "categories": {name: _circular([item for item in items if item["category"] == name]) for name in names},
        "items": items,
    }


def _circular(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    questions = {item["question"]: item["circular"] for item in items}
    return {"questions": len(questions), "accuracy": mean(questions.values())}
