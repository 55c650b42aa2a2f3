"""Supervised fine-tuning: the negative log-likelihood of reference tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num


def token_nll(
    log_probs: Float[Array, "batch tokens"], mask: Bool[Array, "batch tokens"] | Num[Array, "batch tokens"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of −log π over the tokens where `mask` is true, in nats, and how many they are.

    Two numbers, not their quotient, so that gradient accumulation can weight micro-batches by their tokens.
    What stands at masked positions (padding may hold anything, NaN too) never enters value or gradient.
    """
    keep = mask.astype(bool)
    return -jnp.sum(jnp.where(keep, log_probs, 0.0)), jnp.sum(keep, dtype=log_probs.dtype)


def sft_loss(
    log_probs: Float[Array, "batch tokens"], mask: Bool[Array, "batch tokens"] | Num[Array, "batch tokens"]
) -> Float[Array, ""]:
    """Token-level NLL, nats per token: the mean over all unmasked tokens of the batch, as in TRL.

    A mean over tokens, not of per-sequence means: long answers weigh more. 0 where the batch has no token.
    """
    total, count = token_nll(log_probs, mask)
    return total / jnp.maximum(count, 1)
