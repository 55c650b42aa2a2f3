"""At equal gain: is an arm better than the base model that merely stops earlier or later?

A bias on the base's stop token trades recall for CHAIR_i without any learning. The frontier of such points is what an
arm has to beat at its own recall. Between its points it is linear; a point that another one beats in both counts as
the other one, so that the cost never falls as the gain rises; a point without a value does not count.

Shape suffixes: R resamples (or one), P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

Values = Float[np.ndarray, " r"]


@dataclass(frozen=True)
class Matched:
    """A system's cost minus the frontier's at the same gain: below zero is better.

    Attributes:
        delta: [R]; NaN below the frontier's gain, where nothing is known. Above it, where no bias takes the base, the
            frontier's end stands for it: an upper bound, since the frontier never falls as gain rises.
        beyond: [R], whether that is so.
    """

    delta: Values
    beyond: Bool[np.ndarray, " r"]


def matched(
    gain: Values, cost: Values, point_gain: Float[np.ndarray, "r p"], point_cost: Float[np.ndarray, "r p"]
) -> Matched:
    """Compares a system with the base's points, for all resamples at once.

    Args:
        gain: The system's, such as recall.
        cost: The system's, such as CHAIR_i.
        point_gain: Of the base at each stop bias, the unbiased one among them.
        point_cost: Likewise.
    """
    undefined = np.isnan(point_gain) | np.isnan(point_cost)
    # Undefined points go to the left end, where they cannot matter: at gain −1, as bad as can be.
    x, y = np.where(undefined, -1.0, point_gain), np.where(undefined, np.inf, point_cost)
    order = np.lexsort((-y, x), axis=1)
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    y = np.minimum.accumulate(y[:, ::-1], axis=1)[:, ::-1]
    lowest = np.min(np.where(x < 0, np.inf, x), axis=1)
    after = np.sum(x <= gain[:, None], axis=1)
    rows, last = np.arange(len(gain)), x.shape[1] - 1
    left, right = np.clip(after - 1, 0, last), np.clip(after, 0, last)
    x0, x1, y0, y1 = x[rows, left], x[rows, right], y[rows, left], y[rows, right]
    share = np.where(x1 > x0, (gain - x0) / np.where(x1 > x0, x1 - x0, 1.0), 0.0)
    base = np.where(share == 0, y0, y0 + share * (y1 - np.where(np.isfinite(y0), y0, 0.0)))
    base = np.where((gain >= lowest) & np.isfinite(base), base, np.nan)  # no gain is in no place
    return Matched(cost - base, gain > x[:, -1])
