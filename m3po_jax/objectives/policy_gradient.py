"""RLOO and PPO as pure functions of arrays: KL penalties, advantages, clipped losses.

RLOO (Ahmadian et al., arXiv:2402.14740) treats a whole answer as one action: one reward, one ratio, and the mean
reward of a prompt's other answers as its baseline. PPO (Schulman et al., arXiv:1707.06347) treats every token as
one: a value head gives the baseline, GAE (arXiv:1506.02438) the advantages. Names are TRL's.

Shape suffixes: b prompts, k answers of a prompt, t tokens of an answer. Masked tokens count for nothing and come
out as 0; log-probs are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Of r = log π_ref − log π at tokens drawn from π (http://joschu.net/blog/kl-approx.html).
KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "k1": lambda r: -r,  # unbiased, of either sign
    "k2": lambda r: 0.5 * jnp.square(r),  # biased, of less variance
    "k3": lambda r: jnp.expm1(r) - r,  # unbiased, never negative
}


class ClippedLoss(NamedTuple):
    """One value for each action, and whether the clipped value is the one that counts there."""

    losses: Float[Array, ...]
    clipped: Bool[Array, ...]


def masked_mean(x: Float[Array, ...], mask: Bool[Array, ...]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def whiten(x: Float[Array, ...], mask: Bool[Array, ...], *, shift_mean: bool = True) -> Float[Array, ...]:
    """Unit variance over the unmasked entries, and mean 0 with `shift_mean`.

    The variance is the unbiased one, as in TRL's `masked_whiten`.
    """
    mean, count = masked_mean(x, mask), jnp.sum(mask)
    variance = masked_mean(jnp.square(x - mean), mask) * count / jnp.maximum(count - 1, 1)
    whitened = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def kl_estimate(
    log_probs: Float[Array, ...], reference: Float[Array, ...], estimator: str = "k1"
) -> Float[Array, ...]:
    """Estimates of KL(π ‖ π_ref) from tokens drawn from π, by a name of `KL_ESTIMATORS`."""
    return KL_ESTIMATORS[estimator](reference - log_probs)


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """The next coefficient of a controller that holds the KL of an answer at `target` (arXiv:1909.08593, 2.2).

    Args:
        kl: Mean over answers of the KL to the reference, summed over tokens.
        horizon: Episodes in which a coefficient can change by a fifth of itself.
        episodes: Answers that `kl` was measured on.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)


def rloo_advantages(rewards: Float[Array, "b k"], *, normalize: bool = False) -> Float[Array, "b k"]:
    """Each answer's reward minus the mean reward of its prompt's other answers.

    Args:
        rewards: Of whole answers, the KL penalty included; k is at least 2.
        normalize: Mean 0 and standard deviation 1 over all answers, TRL's `normalize_advantages`.
    """
    k = rewards.shape[1]
    others = (jnp.sum(rewards, axis=1, keepdims=True) - rewards) / (k - 1)
    advantages = rewards - others
    if normalize:
        advantages = (advantages - jnp.mean(advantages)) / (jnp.std(advantages, ddof=1) + 1e-4)
    return advantages


def token_rewards(
    scores: Float[Array, "b k"], penalties: Float[Array, "b k t"], mask: Bool[Array, "b k t"]
) -> Float[Array, "b k t"]:
    """Rewards of single tokens: the KL penalty at each, and the answer's score at its last."""
    last = jnp.sum(mask, axis=-1, keepdims=True) - 1
    at_last = jnp.arange(mask.shape[-1]) == last
    return jnp.where(mask, penalties + jnp.where(at_last, scores[..., None], 0.0), 0.0)


def gae(
    rewards: Float[Array, "b k t"],
    values: Float[Array, "b k t"],
    mask: Bool[Array, "b k t"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "b k t"], Float[Array, "b k t"]]:
    """Generalised advantages (not whitened) and returns; an answer ends with its last token, whose value is V of
    the state before it. Equation 16 of arXiv:1506.02438, with value 0 after the end."""
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)
    following = jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)
    deltas = rewards + gamma * following - values

    def back(later: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = delta + gamma * lam * later
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[..., 0]), jnp.moveaxis(deltas, -1, 0), reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return jnp.where(mask, advantages, 0.0), jnp.where(mask, advantages + values, 0.0)


def policy_loss(log_ratio: Float[Array, ...], advantages: Float[Array, ...], cliprange: float = 0.2) -> ClippedLoss:
    """max(−A·ρ, −A·clip(ρ, 1 − c, 1 + c)) with ρ = π / π_old, of tokens (PPO) or of whole answers (RLOO)."""
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - cliprange, 1.0 + cliprange)
    return ClippedLoss(jnp.maximum(plain, clipped), clipped > plain)


def value_loss(
    values: Float[Array, ...],
    old_values: Float[Array, ...],
    returns: Float[Array, ...],
    cliprange_value: float = 0.2,
) -> ClippedLoss:
    """½ max((V − R)², (clip(V, V_old − c, V_old + c) − R)²)."""
    near = jnp.clip(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = jnp.square(values - returns), jnp.square(near - returns)
    return ClippedLoss(0.5 * jnp.maximum(plain, clipped), clipped > plain)
