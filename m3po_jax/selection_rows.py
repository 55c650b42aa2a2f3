"""`selection` on rows: candidates joined with their scores in; PAIR rows, drops and a summary out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from m3po_jax.config import SelectConfig
from m3po_jax.data.pair_rows import prompt_messages
from m3po_jax.data.schema import Image, Prompt, message
from m3po_jax.errors import UserError, nearest
from m3po_jax.scoring.confidence import VARIANTS
from m3po_jax.selection import Pair, Pool, Reason, check_config, select_pools, uses_confidence


def _number(row: dict[str, Any], key: str, where: str) -> float:
    """A float of a row; null is NaN."""
    if key not in row:
        raise UserError(f"no column {key!r}", where=where, remedy="run `m3po score` first")
    value = row[key]
    if value is None:
        return math.nan
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise UserError(f"{key} is not a number: {str(value)[:40]!r}", where=where)


def _confidence(row: dict[str, Any], variant: str, required: bool, where: str) -> float:
    column = f"confidence_{variant}"
    if variant == "mean" and column not in row:
        column = "confidence"  # as hand-written rows have it; it stands for no other variant
    return _number(row, column, where) if required or column in row else math.nan


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError("not an object", where=where)
    for key, kind in (("id", str), ("candidate", (int, np.integer)), ("text", str)):
        if not isinstance(row.get(key), kind) or isinstance(row[key], bool):
            wanted = "an integer" if key == "candidate" else "a string"
            raise UserError(f"{key} must be {wanted}, not {str(row.get(key))[:40]!r}", where=where)
    ids, log_probs = row.get("token_ids"), row.get("token_logprobs")
    if ids is not None and log_probs is not None and len(ids) != len(log_probs):
        raise UserError(f"{len(ids)} token_ids but {len(log_probs)} token_logprobs", where=where)


def _group(row: dict[str, Any], key: str, where: str) -> str:
    """The group of a row's prompt, whose pairs' values are compared; one for all without a key."""
    if not key:
        return ""
    metadata = row.get("metadata")
    if not isinstance(metadata, Mapping) or key not in metadata:
        keys = sorted(metadata) if isinstance(metadata, Mapping) else []
        raise UserError(
            f"the metadata of {row['id']!r} has no {key!r}{nearest(key, keys)}",
            where=where,
            remedy=f"select.budget_within: {', '.join(keys) or 'leave it empty'}",
        )
    return str(metadata[key])


def _length(row: dict[str, Any]) -> int:
    """Response tokens; without recorded tokens the words, plus one for EOS."""
    for key in ("token_ids", "token_logprobs"):
        if row.get(key) is not None:
            return len(row[key])
    return len(row["text"].split()) + 1


def _pair_row(pair: Pair, chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": pair.id}
    if chosen.get("instruction") is not None:
        row["images"] = list(chosen.get("images") or [])
        metadata = chosen.get("metadata")
        prompt = Prompt(
            pair.id,
            (Image(),) * len(row["images"]),
            chosen["instruction"],
            metadata=dict(metadata) if isinstance(metadata, Mapping) else {},
        )
        row["prompt"] = prompt_messages(prompt)
    roles = {"chosen": chosen, "rejected": rejected}
    row |= {role: message("assistant", source["text"]) for role, source in roles.items()}
    row |= {f"{role}_candidate": int(source["candidate"]) for role, source in roles.items()}
    row |= {f"{role}_token_ids": source.get("token_ids") for role, source in roles.items()}
    row |= {f"reference_{role}_logprobs": source.get("token_logprobs") for role, source in roles.items()}
    for key in ("chosen_mas", "rejected_mas", "chosen_confidence", "rejected_confidence", "value"):
        value = getattr(pair, key)
        row[key] = value if math.isfinite(value) else None
    row["prompt_tokens"] = chosen.get("prompt_tokens")
    return row


def select_rows(
    rows: Iterable[dict[str, Any]],
    config: SelectConfig,
    *,
    dispreferred_confidence: str = "",
    pairs_per_prompt: int = 1,
    where: str = "scored candidates",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Pairs from candidate rows joined with their score rows, in any order.

    Args:
        rows: With ``id``, ``candidate``, ``text``, ``mas``; ``confidence_<variant>`` (or ``confidence``, for
            the variant mean) where the rule uses it; ``token_ids`` and ``token_logprobs`` if recorded;
            ``metadata`` (a mapping) where `config.budget_within` names a key of it; ``finish_reason``, which is
            ``length`` where an answer was cut (`config.cut`). A null
            or NaN ``mas`` means that the scorer abstained: that candidate does not take part; likewise a null
            confidence under a rule that uses it. ``instruction`` and ``images`` are carried over where
            present.
        dispreferred_confidence: Another variant for the rejected role; empty: the same one.
        pairs_per_prompt: More than one for a judge that learns from pairs: `selection.draw_pairs`.
        where: The file's name, for errors.

    Returns:
        (pairs, drops, summary). Pairs have the columns of `schema.PAIR` (``images`` and ``prompt`` only if
        the rows have an instruction), by first appearance of their prompt; drops have ``id``, ``reason``,
        ``candidates`` (how many there were), and where the scorer abstained ``detail``, its most frequent reason
        (the rows' ``abstained``); the summary is that of `select_pools`.

    Raises:
        UserError: a missing column, a value of the wrong kind, a candidate number twice in a prompt.
    """
    check_config(config)
    variants = [config.confidence, dispreferred_confidence or config.confidence]
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"unknown variant {variant!r}{nearest(variant, VARIANTS)}", where="select.confidence")
    grouped: dict[str, list[dict[str, Any]]] = {}
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for number, row in enumerate(rows, start=1):
        spot = f"{where}:{number}"
        _check_row(row, spot)
        spot = f"{spot} (id {row['id']!r})"
        if config.candidates is not None and row["candidate"] >= config.candidates:
            continue
        mas = _number(row, "mas", spot)
        confidences = [_confidence(row, v, uses_confidence(config), spot) for v in variants]
        grouped.setdefault(row["id"], []).append(row)
        scores.setdefault(row["id"], []).append((mas, confidences[0], confidences[1]))

    pools = []
    for key, members in grouped.items():
        mas_column, confidence, rejected = np.array(scores[key], np.float64).T
        pools.append(
            Pool(
                key,
                [int(row["candidate"]) for row in members],
                [row["text"] for row in members],
                [_length(row) for row in members],
                mas_column,
                confidence,
                rejected if variants[0] != variants[1] else None,
                _group(members[0], config.budget_within, where),
                [row.get("finish_reason") == "length" for row in members],
            )
        )
    selection = select_pools(pools, config, pairs_per_prompt)
    pairs = []
    for pair in selection.pairs:
        by_number = {int(row["candidate"]): row for row in grouped[pair.id]}
        pairs.append(_pair_row(pair, by_number[pair.chosen], by_number[pair.rejected]))
    drops = []
    for drop in selection.drops:
        entry = {"id": drop.id, "reason": str(drop.reason), "candidates": len(grouped[drop.id])}
        why = Counter(str(row["abstained"]) for row in grouped[drop.id] if row.get("abstained"))
        if drop.reason is Reason.ABSTAINED and why:
            entry["detail"] = why.most_common(1)[0][0]
        drops.append(entry)
    return pairs, drops, selection.summary
