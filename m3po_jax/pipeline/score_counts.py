"""How many candidates have a score, and why the others have none, in the words of terminal, manifest and report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m3po_jax.data import tables
from m3po_jax.scoring.reasons import ABSTAINED, is_asked_again


def is_open(shard: Path, answer_limit: int) -> bool:
    """Whether a score shard has candidates that the same command asks for again; see `is_asked_again`."""
    rows = tables.read_rows(shard, columns=["abstained"])
    return any(is_asked_again(row["abstained"], answer_limit) for row in rows)


def count_scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """``rows``, ``scored`` and ``abstained``, by reason, of score rows."""
    total, reasons = 0, Counter[str]()
    for row in rows:
        total += 1
        if row["mas"] is None or not math.isfinite(row["mas"]):
            reasons[row.get("abstained") or ABSTAINED] += 1
    return {"rows": total, "scored": total - reasons.total(), "abstained": dict(sorted(reasons.items()))}


def counts_line(counts: Mapping[str, Any], notes: Mapping[str, str] | None = None, by: str = "") -> str:
    """``31 of 32 candidates scored, 1 abstained (no_grade: 'It is a picture.')``.

    Args:
        counts: Of `count_scores`.
        notes: Of `Judged`.
        by: Who scored.
    """
    total, scored = counts["rows"], counts["scored"]
    line = f"{scored} of {total} candidates scored{f' by {by}' if by else ''}"
    if scored == total:
        return line
    parts = []
    for reason, count in counts["abstained"].items():
        note = (notes or {}).get(reason)
        parts.append(f"{f'{count} ' if len(counts['abstained']) > 1 else ''}{reason}{f': {note}' if note else ''}")
    return f"{line}, {total - scored} abstained ({'; '.join(parts)})"
