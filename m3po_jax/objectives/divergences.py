"""f-divergences between policy and reference (f-DPO, arXiv:2309.16240), as TRL 1.16 defines them.

With a divergence D_f instead of reverse KL, the implicit reward is β·f'(π/π_ref) up to a normaliser that cancels
between chosen and rejected. Each function here maps the log-ratio log π − log π_ref of a whole answer (nats) to
the score f'(t), t = π/π_ref; all are 0 with slope 1 at a log-ratio of 0, the Jensen-Shannon one with slope 1/2.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m3po_jax.config import TrainConfig
from m3po_jax.reading import check_value

Scores = Float[Array, " pairs"]

# TRL clamps the alpha divergence's exponent here, below float32's overflow; beyond it the score is flat.
LARGEST_EXPONENT = 80.0


def reverse_kl(log_ratio: Scores) -> Scores:
    """f'(t) = log t (+ 1, which cancels): DPO itself."""
    return log_ratio


def forward_kl(log_ratio: Scores) -> Scores:
    """f'(t) = 1 − 1/t. The exponent is clamped as in `alpha_divergence`; TRL lets it overflow."""
    return -jnp.expm1(jnp.minimum(-log_ratio, LARGEST_EXPONENT))


def js_divergence(log_ratio: Scores) -> Scores:
    """Jensen-Shannon, f'(t) = log(2t / (t + 1)) = log 2 + log σ(log t); bounded above by log 2."""
    return math.log(2) + jax.nn.log_sigmoid(log_ratio)


def alpha_divergence(log_ratio: Scores, *, f_alpha_divergence_coef: float) -> Scores:
    """f'(t) = (t^(α−1) − 1) / (α − 1), α the coefficient; reverse KL in the limit α → 1 (|α − 1| < 1e-6, as TRL)."""
    slope = f_alpha_divergence_coef - 1.0
    if abs(slope) < 1e-6:
        return log_ratio
    return jnp.expm1(jnp.minimum(slope * log_ratio, LARGEST_EXPONENT)) / slope


REVERSE_KL = "reverse_kl"  # the divergence of DPO itself, under which every loss has a form
DIVERGENCES: dict[str, Callable[..., Scores]] = {
    REVERSE_KL: reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def keyword_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a formula's parameters: its arguments that are passed by keyword alone."""
    arguments = inspect.signature(function).parameters.values()
    return tuple(argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY)


def divergence_score(f_divergence_type: str, f_alpha_divergence_coef: float = 0.5) -> Callable[[Scores], Scores]:
    """The score function of a divergence by its name in `DIVERGENCES`.

    Raises:
        UserError: unknown name, or a coefficient that is not finite.
    """
    check_value(TrainConfig, "f_divergence_type", f_divergence_type, "train")
    check_value(TrainConfig, "f_alpha_divergence_coef", f_alpha_divergence_coef, "train")
    score = DIVERGENCES[f_divergence_type]
    given = {"f_alpha_divergence_coef": f_alpha_divergence_coef}
    return functools.partial(score, **{name: given[name] for name in keyword_parameters(score)})
