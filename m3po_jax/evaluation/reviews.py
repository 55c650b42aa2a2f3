"""MMHal-Bench and LLaVA-Bench (in the wild) from saved reviews of a judge.

The judge is asked elsewhere; its texts come in, by the question's id, and are read by the official rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.evaluation.metric import (
    Answers,
    Column,
    Item,
    Metric,
    Rates,
    Sums,
    as_label,
    needs_metadata,
    needs_nothing,
    ratio,
    values,
)
from m3po_jax.evaluation.records import Record, join, text_field

# MMHal's types in the order of its questions: question i is of type i mod 8.
MMHAL_TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
FAILED = (-1.0, -1.0)


def mmhal_rating(review: str) -> int | None:
    """The one rating from 0 to 6 that a review gives (``rating: 4``, in any case); None for none or several."""
    text = review.lower()
    ratings = [rating for rating in range(7) if f"rating: {rating}" in text]
    return ratings[0] if len(ratings) == 1 else None


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


def mmhal_sums(item: Item) -> list[float]:
    """What a review adds: its rating, whether it is a hallucination, and 1."""
    return [item["score"], bool(item["hallucinated"]), 1]


def mmhal_rates(sums: Sums) -> Rates:
    """The mean rating and the share of hallucinations from `mmhal_sums`."""
    score, hallucinated, count = np.moveaxis(sums, -1, 0)
    return {"score": ratio(score, count), "hallucination_rate": ratio(hallucinated, count)}


def _mmhal_scores(items: Sequence[Item]) -> dict[str, Any]:
    keys = ("score", "hallucination_rate")
    return {"n": len(items), **dict.fromkeys(keys), **values(mmhal_sums, mmhal_rates, items)}


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


def llava_sums(item: Item) -> list[float]:
    """What a review adds: the model's score, the reference's, and 1."""
    return [item["model_score"], item["reference_score"], 1]


def llava_rates(sums: Sums) -> Rates:
    """100 · mean(model) / mean(reference) and both means, from `llava_sums`."""
    model, reference, count = np.moveaxis(sums, -1, 0)
    means = ratio(model, count), ratio(reference, count)
    return {"score": 100 * ratio(model, reference), "model_mean": means[0], "reference_mean": means[1]}


def _llava_summary(items: Sequence[Item]) -> dict[str, Any]:
    numbers = dict.fromkeys(("score", "model_mean", "reference_mean")) | values(llava_sums, llava_rates, items)
    return {
        "n": len(items),
        **numbers,
        "failed": sum(item["parsed"] is None for item in items),
        "degenerate": []
        if numbers["score"] is not None
        else ["the reference's mean score is 0 or there are no reviews"],
    }


def _reviewed(score: Callable[[Answers, list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def run(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
        return score(answers, [as_label(p, category=p.metadata.get("category")) for p in prompts])

    return run


MMHAL = Metric(
    rules={"official": "eval_gpt4.py of MMHal-Bench: the one `rating: 0` to `rating: 6` of a review, else 0"},
    needs="`metadata.category`, or the benchmark's order",
    missing=needs_nothing,
    score=_reviewed(mmhal),
    sums=mmhal_sums,
    rates=mmhal_rates,
    columns=(
        Column("score", "Rating", "higher", "mean rating, 0 to 6", 2, False),
        Column("hallucination_rate", "Hal rate", "lower", "share of the ratings below 3 (%)"),
    ),
    deciding=("score",),
    judged=True,
)
LLAVA_BENCH = Metric(
    rules={"official": "summarize_gpt_review.py of LLaVA: two numbers in the first line, else −1 for both"},
    needs="`metadata.category` (conv, detail, complex)",
    missing=needs_metadata("category", str),
    score=_reviewed(llava_bench),
    sums=llava_sums,
    rates=llava_rates,
    columns=(Column("score", "Relative", "higher", "the model's mean in percent of the reference's", 1, False),),
    deciding=("score",),
    judged=True,
)
