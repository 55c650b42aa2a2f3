"""Percentile bootstrap over images (Efron, 1979).

Questions about one image, and the mentions of one caption, are not independent: whole images are drawn with
replacement, so the interval does not shrink because more was asked about the same pictures. One seed draws the same
images whatever is computed of them, so that differences between systems are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num

Statistic = Callable[[Num[np.ndarray, "*batch columns"]], Float[np.ndarray, "*batch"]]
LEVEL = 0.95
# Resamples are drawn in blocks of at most this many numbers.
_BLOCK = 4_000_000


def ratio_of_sums(sums: Num[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch"]:
    """First column over second; NaN where the second is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] != 0, sums[..., 0] / sums[..., 1], np.nan)


def image_sums(
    images: Sequence[Hashable], values: Num[np.ndarray, "rows columns"], order: Mapping[Any, int] | None = None
) -> Float[np.ndarray, "n columns"]:
    """What each image adds to each column, over its rows; zero for an image without any.

    Args:
        images: Of each row.
        values: What each row adds.
        order: The place of every image; None: in the order of the rows.
    """
    order = order or {image: place for place, image in enumerate(dict.fromkeys(images))}
    table = np.zeros((len(order), values.shape[1]))
    np.add.at(table, [order[image] for image in images], values)
    return table


def weights(count: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "block n"]]:
    """How often each of `count` images is drawn, in blocks: once each (the sample), then `resamples` times anew."""
    yield np.ones((1, count))
    rng = np.random.Generator(np.random.PCG64(seed))
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def resampled(
    table: Float[np.ndarray, "n columns"], resamples: int, seed: int
) -> Float[np.ndarray, "{1+resamples} columns"]:
    """Column sums of the sample and of its resamples, from `image_sums`."""
    return np.concatenate([drawn @ table for drawn in weights(len(table), resamples, seed)])


def percentiles(sample: Float[np.ndarray, " r"], level: float = LEVEL) -> tuple[float | None, float | None, int]:
    """(low, high, resamples that are undefined) of a statistic's resamples; None where all are."""
    defined = sample[~np.isnan(sample)]
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist() if len(defined) else (None, None)
    return low, high, len(sample) - len(defined)


def bootstrap(
    images: Sequence[Hashable],
    values: Num[np.ndarray, "rows columns"] | Sequence[Sequence[float]],
    statistic: Statistic = ratio_of_sums,
    *,
    resamples: int = 2000,
    level: float = LEVEL,
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
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(images):
        raise ValueError(f"values of shape {rows.shape} do not fit {len(images)} rows")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples={resamples} and level={level} are out of range")
    outcome: dict[str, Any] = {"resamples": resamples, "level": level, "seed": seed}
    if not len(rows):
        return {"estimate": None, "low": None, "high": None, "n_images": 0, "undefined": resamples, **outcome}
    table = image_sums(images, rows)
    estimate, *sample = statistic(resampled(table, resamples, seed))
    low, high, undefined = percentiles(np.array(sample), level)
    return {
        "estimate": None if np.isnan(estimate) else float(estimate),
        "low": low,
        "high": high,
        "n_images": len(table),
        "undefined": undefined,
        **outcome,
    }
