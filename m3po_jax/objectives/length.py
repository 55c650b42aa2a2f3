"""Length-desensitised log-probabilities (LD-DPO, arXiv:2409.06411)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def length_desensitised_sums(
    log_probs: Float[Array, "pairs 2 tokens"], mask: Bool[Array, "pairs 2 tokens"], ld_alpha: float
) -> Float[Array, "pairs 2"]:
    """Σ_{t ≤ n} log π_t + α·Σ_{t > n} log π_t of both answers of each pair, n the shorter one's length, in nats.

    The longer answer's tokens beyond the shorter one's length (its verbose part) count α times: α = 1 is the plain
    sum, α = 0 leaves them out (arXiv:2409.06411; TRL's `ld_alpha`).

    Args:
        log_probs: Of chosen and rejected answers; masked positions may hold anything.
        mask: Response tokens, EOS included; they need not be contiguous.
        ld_alpha: α in [0, 1].
    """
    positions = jnp.cumsum(mask, axis=-1)
    shared = jnp.min(positions[..., -1:], axis=1, keepdims=True)
    counted = jnp.where(mask, log_probs, 0.0)
    return jnp.sum(jnp.where(positions <= shared, counted, ld_alpha * counted), axis=-1)
