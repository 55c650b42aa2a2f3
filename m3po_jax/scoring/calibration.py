"""Does a score know the truth? AUROC, within-prompt correlation and reliability."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats


def _scored(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth values of the items that have a score."""
    values, truth = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    if values.shape != truth.shape:
        raise ValueError(f"scores have shape {values.shape}, labels {truth.shape}")
    return values[~np.isnan(values)], truth[~np.isnan(values)]


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Chance that a true item outscores a false one, a tie counting one half: the exact rank formula.

    Args:
        scores: [items]; items with a NaN score are left out (the scorer abstained).
        labels: [items], truth values.

    Returns:
        In [0, 1]; 0.5 is no knowledge. NaN where all items are of one kind.
    """
    values, truth = _scored(scores, labels)
    positives = int(truth.sum())
    negatives = truth.size - positives
    if not positives or not negatives:
        return float("nan")
    rank_sum = stats.rankdata(values)[truth].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson's r over the entries where both are finite; NaN below three of them or without variance."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / norm, -1, 1)) if norm > 0 else float("nan")


def within_prompt_correlation(ids: Sequence[Hashable], first: ArrayLike, second: ArrayLike) -> float:
    """Mean over prompts of Pearson's r between two scores of a prompt's candidates.

    Within a prompt, because selection compares candidates of one prompt only: differences between easy and
    hard prompts would feign agreement. Prompts with under three candidates or a constant score do not count.

    Args:
        ids: Prompt of each candidate, [candidates], in any order.

    Returns:
        In [−1, 1]; NaN where no prompt counts.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not len(ids) == a.size == b.size:
        raise ValueError(f"{len(ids)} ids, {a.size} and {b.size} scores")
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(ids):
        rows.setdefault(key, []).append(row)
    values = [correlation(a[index], b[index]) for index in rows.values()]
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def concordance(
    ids: Sequence[Hashable], scores: ArrayLike, labels: ArrayLike
) -> tuple[list[Hashable], Float[np.ndarray, " prompts"], Float[np.ndarray, " prompts"]]:
    """(prompts, wins, pairs): how often a true candidate outscores a false one of the same prompt, of how many.

    Σ wins / Σ pairs is the AUROC within prompts: selection compares candidates of one prompt only, and there a score
    that merely tells easy prompts from hard ones knows nothing. A tie wins one half. Prompts whose scored candidates
    are all true or all false have no pair and are left out.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    if not len(ids) == values.size == truth.size:
        raise ValueError(f"{len(ids)} ids, {values.size} scores and {truth.size} labels")
    rows: dict[Hashable, list[int]] = {}
    for row in np.flatnonzero(~np.isnan(values)).tolist():
        rows.setdefault(ids[row], []).append(row)
    kept, wins, pairs = [], [], []
    for key, index in rows.items():
        positive, negative = values[index][truth[index]], values[index][~truth[index]]
        if positive.size and negative.size:
            difference = positive[:, None] - negative
            kept.append(key)
            wins.append(float((difference > 0).sum() + 0.5 * (difference == 0).sum()))
            pairs.append(float(difference.size))
    return kept, np.array(wins), np.array(pairs)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram; empty bins have count 0 and NaN means.

    Attributes:
        edges: Bin limits, [bins + 1]; a bin contains its lower limit, the last one also its upper.
        counts: Items in each bin.
        mean_scores: Mean score in each bin.
        mean_labels: Share of true items in each bin.
        error: Expected calibration error, Σ_b counts_b/n · |mean_score_b − mean_label_b|; meaningful where
            scores are probabilities.
    """

    edges: Float[np.ndarray, " edges"]
    counts: Int[np.ndarray, " bins"]
    mean_scores: Float[np.ndarray, " bins"]
    mean_labels: Float[np.ndarray, " bins"]
    error: float


def reliability(scores: ArrayLike, labels: ArrayLike, bins: int = 10, *, quantiles: bool = False) -> Reliability:
    """How often items of a given score are true.

    Args:
        scores: [items]; NaN is left out.
        labels: [items], truth values.
        bins: How many.
        quantiles: Bins of about equal population, for scores that are no probabilities (log-probs); equal
            limits merge, so there may be fewer. Otherwise bins of equal width over [0, 1].

    Raises:
        ValueError: equal-width bins and a score outside [0, 1].
    """
    values, truth = _scored(scores, labels)
    if not quantiles and values.size and (values.min() < 0 or values.max() > 1):
        raise ValueError("scores outside [0, 1] need quantile bins")
    edges = np.linspace(0, 1, bins + 1)
    if quantiles and values.size:
        edges = np.unique(np.quantile(values, edges))
        edges = np.repeat(edges, 2) if edges.size == 1 else edges
    size = edges.size - 1
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, size - 1)
    counts = np.bincount(index, minlength=size)
    with np.errstate(invalid="ignore"):
        mean_scores = np.bincount(index, values, size) / counts
        mean_labels = np.bincount(index, truth, size) / counts
    gaps = np.abs(mean_scores - mean_labels)[counts > 0]
    error = float(counts[counts > 0] @ gaps / values.size) if values.size else float("nan")
    return Reliability(edges, counts, mean_scores, mean_labels, error)
