"""Means over seeds with their intervals, over images (`evaluation.bootstrap`) and over seeds (Student's).

Two things vary between two runs of an experiment: the images that the test happens to hold, and the seed. Each has
its own interval here. Images: one set of draws with replacement serves every system and seed, so differences are
paired, and an image that all seeds share is drawn for all of them. Seeds: Student's t of the seeds' own values, which
assumes that they are independent and roughly normal, and is wide where there are few.

Shape suffixes: R resamples (the first is the sample itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from m3po_jax.evaluation.bootstrap import LEVEL, percentiles

Values = Float[np.ndarray, " r"]


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
    observed = np.array([value[0] for value in values])
    empty = {"mean": None, "sd": None, "low": None, "high": None, "t_low": None, "t_high": None}
    seeds = [None if np.isnan(value) else float(value) for value in observed]
    low, high, undefined = percentiles(_mean(values)[1:])
    counts = {"seeds": seeds, "undefined": undefined}
    if np.isnan(observed).any():
        return {**empty, **counts}
    summary = {**empty, "mean": float(observed.mean()), "low": low, "high": high, **counts}
    if len(observed) > 1:
        sd = float(observed.std(ddof=1))
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(observed) - 1)) * sd / np.sqrt(len(observed))
        summary |= {"sd": sd, "t_low": float(observed.mean() - half), "t_high": float(observed.mean() + half)}
    return summary


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
