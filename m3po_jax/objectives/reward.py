"""The pairwise logistic loss of reward models (Bradley and Terry; Ouyang et al., arXiv:2203.02155, eq. 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def reward_loss(
    chosen: Float[Array, " b"],
    rejected: Float[Array, " b"],
    *,
    center_rewards_coefficient: float = 0.0,
    margin: Float[Array, " b"] | float = 0.0,
) -> Float[Array, " b"]:
    """−log σ(r_w − r_l − margin) + coefficient · (r_w + r_l)², one value a pair, nats.

    The second term keeps rewards around 0 (Eisenstein et al., arXiv:2312.09244), which the first leaves open:
    it reads differences alone. The mean over a batch is the loss of TRL's `RewardTrainer`.

    Args:
        chosen, rejected: Scalar rewards r_w and r_l.
        margin: By how much the chosen answer should win (Touvron et al., arXiv:2307.09288, eq. 2).
    """
    centring = center_rewards_coefficient * jnp.square(chosen + rejected)
    return centring - jax.nn.log_sigmoid(chosen - rejected - margin)
