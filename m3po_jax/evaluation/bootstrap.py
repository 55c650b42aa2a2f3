"""Percentile bootstrap over images (Efron, 1979).

Questions about one image, and the mentions of one caption, are not independent: whole images are drawn with
replacement, so the interval does not shrink because more was asked about the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Statistic = Callable[[Float[np.ndarray, "*batch columns"]], Float[np.ndarray, "*batch"]]
# Resamples are drawn in blocks of at most this many numbers.
_BLOCK = 4_000_000


def ratio_of_sums(sums: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch"]:
    """First column over second; NaN where the second is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] != 0, sums[..., 0] / sums[..., 1], np.nan)


def ratio_difference(sums: Float[np.ndarray, "*batch 4"]) -> Float[np.ndarray, "*batch"]:
    """Ratio of the first two columns minus that of the last two: a paired comparison on the same images."""
    return ratio_of_sums(sums[..., :2]) - ratio_of_sums(sums[..., 2:])


def bootstrap(
    images: Sequence[Hashable],
    values: Float[np.ndarray, "rows columns"] | Sequence[Sequence[float]],
    statistic: Statistic = ratio_of_sums,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Estimate and percentile interval of a statistic of column sums.

    Args:
        images: The image of each row; rows with the same image are drawn together.
        values: What a row adds to each sum, for example (hallucinated mentions, mentions).
        statistic: Maps sums [..., columns] to [...]; NaN where undefined.
        resamples: Number of bootstrap samples.
        level: Coverage, between 0 and 1.
        seed: The same seed and rows give the same interval.

    Returns:
        estimate, low, high (None where undefined), n_images, resamples, undefined (resamples left out), level
        and seed.

    Raises:
        ValueError: for arguments that do not fit together.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or len(table) != len(images):
        raise ValueError(f"values of shape {table.shape} do not fit {len(images)} rows")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples={resamples} and level={level} are out of range")
    outcome: dict[str, Any] = {"resamples": resamples, "level": level, "seed": seed}
    order = {image: position for position, image in enumerate(dict.fromkeys(images))}
    if not order:
        return {"estimate": None, "low": None, "high": None, "n_images": 0, "undefined": resamples, **outcome}
    sums = np.zeros((len(order), table.shape[1]))
    np.add.at(sums, [order[image] for image in images], table)
    rng = np.random.Generator(np.random.PCG64(seed))
    block = max(1, _BLOCK // len(order))
    drawn = []
    for start in range(0, resamples, block):
        picks = rng.integers(len(order), size=(min(block, resamples - start), len(order)))
        drawn.append(statistic(sums[picks].sum(axis=1)))
    sample = np.concatenate(drawn)
    defined = sample[~np.isnan(sample)]
    estimate = float(statistic(sums.sum(axis=0)))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist() if len(defined) else (None, None)
    return {
        "estimate": None if np.isnan(estimate) else estimate,
        "low": low,
        "high": high,
        "n_images": len(order),
        "undefined": len(sample) - len(defined),
        **outcome,
    }
