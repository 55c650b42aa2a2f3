"""mDPO's two terms beside DPO (Wang et al., arXiv:2406.11839): conditional preference and anchored preference.

Pure functions of per-sequence log-probabilities (sums over response tokens, nats), one loss per pair.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

Losses = Float[Array, " pairs"]


def conditional_logits(
    policy_chosen: Losses, policy_corrupted: Losses, reference_chosen: Losses, reference_corrupted: Losses
) -> Losses:
    """r(y_w | image) − r(y_w | corrupted image), r the log-ratios log π − log π_ref of the chosen answer.

    Positive where training has tied the answer to its image rather than to its text.
    """
    return (policy_chosen - reference_chosen) - (policy_corrupted - reference_corrupted)


def conditional_loss(logits: Losses, beta: float) -> Losses:
    """Conditional preference, −log σ(β·`conditional_logits`) (arXiv:2406.11839).

    The chosen answer with its image is preferred to the same answer with a corrupted image, which the text alone
    cannot tell apart. ln 2 where policy and reference agree.
    """
    return -jax.nn.log_sigmoid(beta * logits)


def anchor_loss(policy_chosen: Losses, reference_chosen: Losses, beta: float, delta: float = 0.0) -> Losses:
    """Anchored preference, −log σ(β(log π(y_w) − log π_ref(y_w)) − δ) (arXiv:2406.11839).

    Holds the chosen answer's reward above δ (in units of reward; 0 in the authors' code), against falling chosen
    likelihood. ln 2 at δ = 0 where policy and reference agree.
    """
    return -jax.nn.log_sigmoid(beta * (policy_chosen - reference_chosen) - delta)
