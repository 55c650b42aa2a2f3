"""Joining answers to labels by id, and fractions that may be undefined."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from m3po_jax.errors import UserError

Record = Mapping[str, Any]


def id_text(value: Any, where: str) -> str:
    """An id as text: 1, 1.0 and "1" are one id.

    Raises:
        UserError: it is missing, or neither text nor a whole number.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        wrong = "the record has no id" if value is None else f"the id {value!r} is neither text nor a whole number"
        raise UserError(wrong, where=where)
    return str(value)


def by_id(records: Iterable[Record], what: str) -> dict[str, Record]:
    """Records keyed by the text of their ``id``.

    Raises:
        UserError: for a record without an id, or two with the same one.
    """
    keyed: dict[str, Record] = {}
    for position, record in enumerate(records):
        key = id_text(record.get("id"), f"{what} {position + 1}")
        if key in keyed:
            raise UserError(f"the id {key!r} occurs twice", where=f"{what} {position + 1}")
        keyed[key] = record
    return keyed


def join(answers: Iterable[Record], labels: Iterable[Record]) -> list[tuple[Record, Record]]:
    """(answer, label) for every label, in the labels' order.

    Raises:
        UserError: when an id is missing, repeated, or on one side only. Scores of a partial or shifted join
            look plausible and are wrong, so nothing is dropped silently.
    """
    answered, labelled = by_id(answers, "answer"), by_id(labels, "label")
    for missing, what in (
        (labelled.keys() - answered.keys(), "labels have no answer"),
        (answered.keys() - labelled.keys(), "answers have no label"),
    ):
        if missing:
            raise UserError(
                f"{len(missing)} {what} (first id: {min(missing)!r}); there are {len(answered)} answers and "
                f"{len(labelled)} labels",
                remedy="score the answers against the question file that they were made from",
            )
    return [(answered[key], label) for key, label in labelled.items()]


def read_text(path: str) -> str:
    """A text file that a recipe names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({type(error).__name__})", where=path) from None


def text_field(record: Record, field: str = "text") -> str:
    """A field that must be text.

    Raises:
        UserError: when it is missing or something else.
    """
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(f"{field!r} must be text, not {type(value).__name__}", where=f"id {record.get('id')!r}")
    return value


def yes_no_items(
    answers: Iterable[Record],
    labels: Iterable[Record],
    parse: Callable[[str], str | None],
    unparsed: Callable[[str], bool],
    *,
    categories: Collection[str] | None = None,
    kind: str = "category",
) -> list[dict[str, Any]]:
    """One item a yes/no question, in the labels' order: what POPE, MME and AMBER count.

    Args:
        answers: ``{"id", "text"}``; nothing is stripped or normalised.
        labels: ``{"id", "label"}``, yes or no; ``category`` and ``image`` may be added.
        parse: An answer's text -> yes, no or what else the benchmark's rule makes of it.
        unparsed: Whether the rule found neither yes nor no in a text.
        categories: Those that there are; None: any, and "all" where a label has none.
        kind: What the benchmark calls them, for the error.

    Raises:
        UserError: ids that do not match, an answer that is no text, a label that is neither yes nor no, an unknown
            category.
    """
    items: list[dict[str, Any]] = []
    for answer, label in join(answers, labels):
        where = f"id {label.get('id')!r}"
        truth = text_field(label, "label").strip().lower()
        if truth not in ("yes", "no"):
            raise UserError(f"the label is {truth!r}, not yes or no", where=where)
        category = str(label.get("category") or "all")
        if categories is not None and category not in categories:
            raise UserError(
                f"unknown {kind} {category!r}", where=where, remedy=f"one of {', '.join(sorted(categories))}"
            )
        text = text_field(answer)
        parsed = parse(text)
        items.append(
            {
                "id": str(label["id"]),
                "image": label.get("image"),
                "category": category,
                "text": text,
                "label": truth,
                "parsed": parsed,
                "unparsed": unparsed(text),
                "correct": parsed == truth,
            }
        )
    return items


def ratio(numerator: float, denominator: float) -> float | None:
    """A fraction, or None where the denominator is zero."""
    return numerator / denominator if denominator else None


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean, or None of nothing."""
    values = list(values)
    return ratio(sum(values), len(values))
