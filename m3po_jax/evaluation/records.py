"""Joining answers to labels by id, and fractions that may be undefined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from m3po_jax.errors import UserError

Record = Mapping[str, Any]


def by_id(records: Iterable[Record], what: str) -> dict[str, Record]:
    """Records keyed by the text of their ``id``.

    Raises:
        UserError: for a record without an id, or two with the same one.
    """
    keyed: dict[str, Record] = {}
    for position, record in enumerate(records):
        if record.get("id") is None:
            raise UserError("the record has no id", where=f"{what} {position + 1}")
        key = str(record["id"])
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


def text_field(record: Record, field: str = "text") -> str:
    """A field that must be text.

    Raises:
        UserError: when it is missing or something else.
    """
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(f"{field!r} must be text, not {type(value).__name__}", where=f"id {record.get('id')!r}")
    return value


def ratio(numerator: float, denominator: float) -> float | None:
    """A fraction, or None where the denominator is zero."""
    return numerator / denominator if denominator else None


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean, or None of nothing."""
    values = list(values)
    return ratio(sum(values), len(values))
