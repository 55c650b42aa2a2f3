"""MMHal-Bench and LLaVA-Bench (in the wild) from saved reviews of a judge.

The judge is asked elsewhere; its texts come in, by the question's id, and are read by the official rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.evaluation.records import Record, join, mean, ratio, text_field

# MMHal's types in the order of its questions: question i is of type i mod 8.
MMHAL_TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
FAILED = (-1.0, -1.0)


def mmhal_rating(review: str) -> int | None:
    """The one rating from 0 to 6 that a review gives (``rating: 4``, in any case); None for none or several."""
    text = review.lower()
    found = [rating for rating in range(7) if f"rating: {rating}" in text]
    return found[0] if len(found) == 1 else None


def mmhal(reviews: Iterable[Record], labels: Sequence[Record]) -> dict[str, Any]:
    """MMHal-Bench (Sun et al., arXiv:2309.14525) from its judge's reviews.

    A review without one clear rating scores 0, as officially, and is counted as unparsed.

    Args:
        reviews: ``{"id", "text"}``: what the judge wrote.
        labels: ``{"id"}`` in the benchmark's order, with ``category`` (the type of question) or without: then the
            place decides it.

    Returns:
        ``summary``: n, ``score`` (mean, 0 to 6), ``hallucination_rate`` (share of ratings below 3), unparsed;
        ``categories``: n, score and rate of each type; ``items``.
    """
    items: list[dict[str, Any]] = []
    for place, (review, label) in enumerate(join(reviews, labels)):
        text = text_field(review)
        rating = mmhal_rating(text)
        items.append(
            {
                "id": str(label["id"]),
                "image": label.get("image"),
                "category": label.get("category") or MMHAL_TYPES[place % len(MMHAL_TYPES)],
                "text": text,
                "parsed": rating,
                "unparsed": rating is None,
                "score": rating or 0,
                "hallucinated": (rating or 0) < 3,
            }
        )
    names = list(dict.fromkeys(item["category"] for item in items))
    return {
        "summary": {
            **_mmhal_scores(items),
            "unparsed": sum(item["unparsed"] for item in items),
            "degenerate": [] if items else ["there are no reviews"],
        },
        "categories": {name: _mmhal_scores([item for item in items if item["category"] == name]) for name in names},
        "items": items,
    }


def _mmhal_scores(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "n": len(items),
        "score": mean(item["score"] for item in items),
        "hallucination_rate": mean(item["hallucinated"] for item in items),
    }


def llava_scores(review: str) -> tuple[float, float]:
    """(reference, model) of a LLaVA-Bench review: its first line is two numbers with one space or comma between them.

    Anything else is (−1, −1), "8, 7" included, as in the official code; nan and inf too, which it would let through.
    """
    parts = review.split("\n", maxsplit=1)[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return FAILED
    return (first, second) if math.isfinite(first) and math.isfinite(second) else FAILED


def llava_bench(reviews: Iterable[Record], labels: Iterable[Record]) -> dict[str, Any]:
    """LLaVA-Bench in the wild (Liu et al., arXiv:2304.08485) from its judge's reviews.

    Failed reviews stay in the means as (−1, −1), as officially.

    Args:
        reviews: ``{"id", "text"}``, the reference's score first.
        labels: ``{"id"}`` with ``category`` (conv, detail or complex).

    Returns:
        ``summary``: n, ``score`` = 100 · mean(model) / mean(reference), both means, ``failed``; ``categories``: the
        same for each; ``items``.

    Raises:
        UserError: ids that do not match, or a question without a category.
    """
    items: list[dict[str, Any]] = []
    for review, label in join(reviews, labels):
        if not label.get("category"):
            raise UserError("the question has no category", where=f"id {label.get('id')!r}")
        text = text_field(review)
        pair = llava_scores(text)
        items.append(
            {
                "id": str(label["id"]),
                "image": label.get("image"),
                "category": str(label["category"]),
                "text": text,
                "parsed": None if pair == FAILED else list(pair),
                "reference_score": pair[0],
                "model_score": pair[1],
            }
        )
    names = sorted({item["category"] for item in items})
    return {
        "summary": _llava_summary(items),
        "categories": {name: _llava_summary([item for item in items if item["category"] == name]) for name in names},
        "items": items,
    }


def _llava_summary(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    model, reference = mean(i["model_score"] for i in items), mean(i["reference_score"] for i in items)
    score = None if model is None or reference is None else ratio(100 * model, reference)
    return {
        "n": len(items),
        "score": score,
        "model_mean": model,
        "reference_mean": reference,
        "failed": sum(item["parsed"] is None for item in items),
        "degenerate": [] if score is not None else ["the reference's mean score is 0 or there are no reviews"],
    }
