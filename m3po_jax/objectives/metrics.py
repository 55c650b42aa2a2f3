"""Training metrics of preference optimisation, under TRL's names."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def preference_metrics(
    policy_chosen: Float[Array, " pairs"],
    policy_rejected: Float[Array, " pairs"],
    reference_chosen: Float[Array, " pairs"],
    reference_rejected: Float[Array, " pairs"],
    *,
    chosen_rewards: Float[Array, " pairs"],
    rejected_rewards: Float[Array, " pairs"],
    chosen_lengths: Num[Array, " pairs"],
    rejected_lengths: Num[Array, " pairs"],
) -> dict[str, Float[Array, ""]]:
    """Means over a batch of pairs.

    Args:
        policy_chosen: Summed log-probs, as `preference_loss` takes them; likewise the next three.
        chosen_rewards: As `preference_loss` gives them.
        chosen_lengths: Response tokens, EOS included.

    Returns:
        TRL's ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies`` (a strict
        comparison: a tie counts as wrong, so step 0 reads 0), ``logps/chosen``, ``logps/rejected``; and
        ``delta_logps/chosen``, ``delta_logps/rejected``: (log π − log π_ref) per token, in nats.
        A falling ``delta_logps/chosen`` is likelihood displacement, the known harm of preference losses
        (arXiv:2410.08847).
    """
    chosen_delta = (policy_chosen - reference_chosen) / jnp.maximum(chosen_lengths, 1)
    rejected_delta = (policy_rejected - reference_rejected) / jnp.maximum(rejected_lengths, 1)
    return {
        "rewards/chosen": jnp.mean(chosen_rewards),
        "rewards/rejected": jnp.mean(rejected_rewards),
        "rewards/margins": jnp.mean(chosen_rewards - rejected_rewards),
        "rewards/accuracies": jnp.mean((chosen_rewards > rejected_rewards).astype(chosen_rewards.dtype)),
        "logps/chosen": jnp.mean(policy_chosen),
        "logps/rejected": jnp.mean(policy_rejected),
        "delta_logps/chosen": jnp.mean(chosen_delta),
        "delta_logps/rejected": jnp.mean(rejected_delta),
    }
