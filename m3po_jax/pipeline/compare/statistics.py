"""Means over seeds, paired bootstrap over images, and Student intervals over seeds, in NumPy.

Two things vary between two runs of an experiment: the images that the test happens to hold, and the seed. Each has
its own interval here. Images: one set of draws with replacement serves every system and seed, so differences are
paired, and an image that all seeds share is drawn for all of them. Seeds: Student's t of the seeds' own values, which
assumes that they are independent and roughly normal, and is wide where there are few.

Shape suffixes: N images, C columns, R resamples (the first is the sample itself), P points of a frontier.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95

Sums = Float[np.ndarray, "r c"]
Values = Float[np.ndarray, " r"]


def weights(images: Sequence[Hashable], resamples: int, seed: int) -> Float[np.ndarray, "r n"]:
    """How often each image is drawn: once in row 0 (the sample), then `resamples` draws with replacement."""
    count = len(images)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    return np.concatenate([np.ones((1, count)), drawn])


def image_sums(
    items: Sequence[Mapping[str, Any]],
    images: Mapping[str, str],
    order: Mapping[str, int],
    columns: Callable[[Mapping[str, Any]], Sequence[float]],
) -> Float[np.ndarray, "n c"]:
    """What each image adds to each column, over its items; zero for an image without any."""
    width = len(columns(items[0]))
    table = np.zeros((len(order), width))
    for item in items:
        table[order[images[item["id"]]]] += columns(item)
    return table


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b != 0, a / b, np.nan)


def chair_columns(item: Mapping[str, Any]) -> list[float]:
    wrong, tokens = len(item["hallucinated"]), item.get("tokens")
    return [
        wrong,
        len(item["mentions"]),
        bool(wrong),
        1,
        len(item["found"]),
        len(item["objects"]),
        np.nan if tokens is None else tokens,
    ]


def chair_metrics(sums: Sums) -> dict[str, Values]:
    wrong, mentions, with_wrong, count, found, truth, tokens = sums.T
    chair_i, recall = _ratio(wrong, mentions), _ratio(found, truth)
    return {
        "chair_i": chair_i,
        "chair_s": _ratio(with_wrong, count),
        "recall": recall,
        # Where every mention is false, F1 is 0; where a rate is undefined, so is F1.
        "f1": np.where(chair_i - recall == 1, 0.0, _ratio(2 * (1 - chair_i) * recall, 1 - chair_i + recall)),
        "mean_objects": _ratio(mentions, count),
        "mean_tokens": _ratio(tokens, count),
    }


def pope_columns(item: Mapping[str, Any]) -> list[float]:
    yes, correct = item["parsed"] == "yes", bool(item["correct"])
    hit = yes and correct
    return [correct, 1, yes, 2 * hit, 2 * hit + (not correct)]


def pope_metrics(sums: Sums) -> dict[str, Values]:
    correct, count, yes, twice_hits, denominator = sums.T
    return {
        "accuracy": _ratio(correct, count),
        "f1": np.where(denominator == 0, 0.0, _ratio(twice_hits, denominator)),  # POPE's own rule
        "yes_ratio": _ratio(yes, count),
    }


def short_answer_columns(item: Mapping[str, Any]) -> list[float]:
    return [bool(item["correct"]), 1]


def short_answer_metrics(sums: Sums) -> dict[str, Values]:
    return {"accuracy": _ratio(*sums.T)}


METRICS: dict[str, tuple[Callable[[Mapping[str, Any]], list[float]], Callable[[Sums], dict[str, Values]]]] = {
    "chair": (chair_columns, chair_metrics),
    "pope": (pope_columns, pope_metrics),
    "short_answer": (short_answer_columns, short_answer_metrics),
}


@dataclass(frozen=True)
class Matched:
    """CHAIR_i minus that of the base's stop-bias frontier at the same recall.

    Attributes:
        delta: [R]; NaN below the frontier's recall, where nothing is known. Above it, where no bias takes the base,
            the frontier's end stands for it: an upper bound, since the frontier never falls as recall rises.
        beyond: [R], whether that is so.
    """

    delta: Values
    beyond: np.ndarray


def matched(
    recall: Values, rate: Values, point_recall: Float[np.ndarray, "r p"], point_rate: Float[np.ndarray, "r p"]
) -> Matched:
    """ΔC of `evaluation.frontier`, for all resamples at once.

    Args:
        recall: The arm's.
        rate: The arm's CHAIR_i.
        point_recall: Of the base at each stop bias.
        point_rate: CHAIR_i likewise.
    """
    undefined = np.isnan(point_recall) | np.isnan(point_rate)
    # Undefined points go to the left end, where they cannot matter: at recall −1, as bad as can be.
    x, y = np.where(undefined, -1.0, point_recall), np.where(undefined, np.inf, point_rate)
    order = np.lexsort((-y, x), axis=1)
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    y = np.minimum.accumulate(y[:, ::-1], axis=1)[:, ::-1]
    lowest = np.min(np.where(x < 0, np.inf, x), axis=1)
    after = np.sum(x <= recall[:, None], axis=1)
    rows, last = np.arange(len(recall)), x.shape[1] - 1
    left, right = np.clip(after - 1, 0, last), np.clip(after, 0, last)
    x0, x1, y0, y1 = x[rows, left], x[rows, right], y[rows, left], y[rows, right]
    share = np.where(x1 > x0, (recall - x0) / np.where(x1 > x0, x1 - x0, 1.0), 0.0)
    base = np.where(share == 0, y0, y0 + share * (y1 - np.where(np.isfinite(y0), y0, 0.0)))
    base = np.where((recall < lowest) | ~np.isfinite(base), np.nan, base)
    return Matched(rate - base, recall > x[:, -1])


def _mean(values: Sequence[Values]) -> Values:
    """Mean over seeds; NaN where any seed is undefined, so that no resample averages over fewer of them."""
    return np.mean(np.stack(values), axis=0)


def summarise(values: Sequence[Values]) -> dict[str, Any]:
    """One quantity over seeds: mean, spread, and both intervals.

    Args:
        values: One array a seed, [R], the sample's own value first.

    Returns:
        ``mean`` over seeds; ``sd`` (n − 1; None of one seed); ``seeds``, their values; ``low`` and ``high``, the
        percentile interval over images of that mean; ``t_low`` and ``t_high``, Student's over seeds (None below two);
        ``undefined``, resamples left out. None throughout where a seed's own value is undefined.
    """
    own = np.array([value[0] for value in values])
    empty = {"mean": None, "sd": None, "low": None, "high": None, "t_low": None, "t_high": None}
    seeds = [None if np.isnan(value) else float(value) for value in own]
    drawn = _mean(values)[1:]
    defined = drawn[~np.isnan(drawn)]
    counts = {"seeds": seeds, "undefined": len(drawn) - len(defined)}
    if np.isnan(own).any():
        return {**empty, **counts}
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(defined, tails).tolist() if len(defined) else (None, None)
    found = {**empty, "mean": float(own.mean()), "low": low, "high": high, **counts}
    if len(own) > 1:
        sd = float(own.std(ddof=1))
        half = float(stats.t.ppf(tails[1], len(own) - 1)) * sd / np.sqrt(len(own))
        found |= {"sd": sd, "t_low": float(own.mean() - half), "t_high": float(own.mean() + half)}
    return found


MIN_SEEDS = 3  # of a claim


def outcome(difference: Mapping[str, Any], better: str) -> str:
    """What a paired difference shows: ``better``, ``worse``, ``tie`` (an interval holds zero) or ``few_seeds``.

    Both intervals must exclude zero on the same side: over images and over seeds. ``undefined`` without a value.
    """
    if difference["mean"] is None or difference["low"] is None:
        return "undefined"
    if sum(seed is not None for seed in difference["seeds"]) < MIN_SEEDS:
        return "few_seeds"
    low = min(difference["low"], difference["t_low"])
    high = max(difference["high"], difference["t_high"])
    if low <= 0 <= high:
        return "tie"
    return "better" if (high < 0) == (better == "lower") else "worse"
