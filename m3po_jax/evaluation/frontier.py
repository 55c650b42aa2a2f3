"""Recall-matched CHAIR: is an arm better than the base model that merely stops earlier?

A bias on the base's stop token trades recall for CHAIR_i without any learning. The frontier of such points is
what an arm has to beat at its own recall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def frontier(points: Sequence[Mapping[str, float | None]]) -> list[tuple[float, float]]:
    """(recall, lowest chair_i with at least this recall), recall rising.

    A point that another one beats in both is lifted to it: chair_i never falls as recall rises. Points where
    either value is None are left out.
    """
    best: dict[float, float] = {}
    for point in points:
        recall, rate = point.get("recall"), point.get("chair_i")
        if recall is not None and rate is not None:
            best[recall] = min(rate, best.get(recall, rate))
    curve: list[tuple[float, float]] = []
    lowest = float("inf")
    for recall in sorted(best, reverse=True):
        lowest = min(lowest, best[recall])
        curve.append((recall, lowest))
    return curve[::-1]


def matched(arm: Mapping[str, float | None], points: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """ΔC: the arm's chair_i minus the base frontier's at the arm's recall; negative is better.

    Args:
        arm: A CHAIR summary (``recall`` and ``chair_i``, fractions).
        points: Summaries of the base at several stop biases, the unbiased one among them.

    Returns:
        ``delta_chair_i`` and ``frontier_chair_i`` (linear between points; None outside the frontier's recall
        range, nothing is extrapolated), ``reason`` for a None, and ``frontier``.
    """
    curve = frontier(points)
    recall, rate = arm.get("recall"), arm.get("chair_i")
    reason = None
    if recall is None or rate is None:
        reason = "the arm's recall or chair_i is undefined"
    elif not curve:
        reason = "the frontier has no points"
    elif not curve[0][0] <= recall <= curve[-1][0]:
        reason = f"recall {recall:.4f} is outside the frontier's range {curve[0][0]:.4f} to {curve[-1][0]:.4f}"
    base = None
    if reason is None and recall is not None:
        base = float(np.interp(recall, [point[0] for point in curve], [point[1] for point in curve]))
    return {
        "recall": recall,
        "chair_i": rate,
        "frontier_chair_i": base,
        "delta_chair_i": None if base is None or rate is None else rate - base,
        "reason": reason,
        "frontier": [list(point) for point in curve],
    }
