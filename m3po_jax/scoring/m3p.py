"""The M3P-Score (docs/method.md): alignment and confidence of one prompt's candidates, in both roles."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

Scores = Float[np.ndarray, " candidates"]


def z_scores(values: ArrayLike) -> Scores:
    """(v − mean) / std within one prompt's pool, with the population's std (divisor K).

    All zeros where the values are equal up to rounding: a signal that says nothing moves no score. Values
    that are not finite become NaN and do not count.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    result = np.full(values.shape, np.nan)
    if not finite.any():
        return result
    finite_values = values[finite]
    centred = finite_values - finite_values.mean()
    std = np.sqrt(np.mean(centred**2))
    rounding = 8 * np.finfo(np.float64).eps * np.abs(finite_values).max()
    result[finite] = centred / std if std > rounding else 0.0
    return result


def m3p_scores(
    mas: ArrayLike, confidence: ArrayLike, lambda_preferred: float, lambda_dispreferred: float
) -> tuple[Scores, Scores]:
    """M3P₊ and M3P₋ of every candidate of one prompt: s·z(m) + λ_s·z(c), s = ±1.

    Args:
        mas: Multimodal Alignment Scores m, [candidates].
        confidence: c, [candidates], in any unit (z-scored here).
        lambda_preferred: λ₊, how much confidence speaks for a chosen answer.
        lambda_dispreferred: λ₋, how much confidence makes a bad answer a hard negative. The signs differ on
            purpose: one score with argmax and argmin would pick *unconfident* negatives.

    Returns:
        (preferred, dispreferred), each [candidates]; NaN where an input that enters is NaN. A λ of 0 leaves
        confidence out altogether, absent values included.
    """
    quality = z_scores(mas)
    sureness = z_scores(confidence)
    if quality.shape != sureness.shape:
        raise ValueError(f"mas has shape {quality.shape}, confidence {sureness.shape}")
    preferred = quality + lambda_preferred * sureness if lambda_preferred else quality
    dispreferred = -quality + lambda_dispreferred * sureness if lambda_dispreferred else -quality
    return preferred, dispreferred
