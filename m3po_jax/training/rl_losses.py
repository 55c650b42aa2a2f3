"""Losses of the reward model and of the policy that learns from it, as functions of a model and a batch.

Like those of `training.losses`; `training.objectives` lists them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from m3po_jax.config import RLConfig, TrainConfig
from m3po_jax.data.collation import TreeBatch
from m3po_jax.errors import UserError
from m3po_jax.models.forward import branch_hidden, states_scores
from m3po_jax.models.heads import answer_rewards
from m3po_jax.objectives.policy_gradient import policy_loss, value_loss
from m3po_jax.objectives.reward import reward_loss
from m3po_jax.training.losses import LossOutput, answer_log_probs, base_learns, branch_inputs, image_features


class RolloutBatch(NamedTuple):
    """Prompts with the K answers that the policy gave, what it thought of their tokens, and what they earned.

    The first seven fields are those of a `TreeBatch`; `reference` is not read. Per token: `old_log_probs` in nats as
    recorded at sampling, `advantages` (of RLOO: that of the whole answer at every token), and for PPO `old_values`
    and `returns` (else zeros).
    """

    prefix_ids: Int[Any, "b p"]
    prefix_mask: Bool[Any, "b p"]
    pixel_values: Float[Any, "b m h w 3"] | None
    branch_ids: Int[Any, "b k t"]
    branch_mask: Bool[Any, "b k t"]
    reference: Float[Any, "b k"]
    row_index: Int[Any, " b"]
    old_log_probs: Float[Any, "b k t"]
    advantages: Float[Any, "b k t"]
    old_values: Float[Any, "b k t"]
    returns: Float[Any, "b k t"]
    features: None = None  # a rollout's images are not cached


def reward(
    model: Any,
    batch: TreeBatch,
    config: TrainConfig,
    *,
    tokens: jax.Array | None = None,
    reference_model: Any = None,
    remat: str = "none",
) -> LossOutput:
    """The pairwise logistic loss on chosen (branch 0) and rejected (branch 1), nats per pair; TRL's metrics."""
    features = image_features(model, batch, remat=remat)
    rewards = answer_rewards(model, *branch_inputs(batch, features), remat=remat, base_learns=base_learns(config))
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    losses = reward_loss(
        chosen,
        rejected,
        center_rewards_coefficient=config.center_rewards_coefficient,
        margin=config.reward_margin,
    )
    metrics = {
        "accuracy": jnp.mean((chosen > rejected).astype(jnp.float32)),
        "margin": jnp.mean(chosen - rejected),
        "min_reward": jnp.min(rewards),
        "mean_reward": jnp.mean(rewards),
        "max_reward": jnp.max(rewards),
    }
    return LossOutput(jnp.mean(losses), metrics, losses, {})


def policy_gradient(
    model: Any,
    batch: RolloutBatch,
    config: TrainConfig,
    *,
    tokens: jax.Array | None = None,
    reference_model: Any = None,
    remat: str = "none",
) -> LossOutput:
    """The clipped loss of RLOO (one ratio an answer, mean over answers) or PPO (one a token, mean over tokens).

    PPO adds `vf_coef` × the value loss of the model's head. The KL penalty is in the advantages already. A row's loss
    is the mean over its answers or tokens.
    """
    rl, mask = config.rl, batch.branch_mask
    features = image_features(model, batch, remat=remat)
    passes: dict[str, Any] = {"remat": remat, "base_learns": base_learns(config)}
    if rl.algorithm == "ppo":
        hidden = branch_hidden(model, *branch_inputs(batch, features), **passes)
        log_probs = jnp.where(mask, states_scores(model, hidden, batch.branch_ids).log_probs, 0.0)
    else:
        log_probs = answer_log_probs(model, batch, features, **passes)
    log_ratio = jnp.where(mask, log_probs - batch.old_log_probs, 0.0)
    lengths = jnp.sum(mask, axis=(1, 2))
    count = jnp.maximum(jnp.sum(mask) if tokens is None else tokens, 1)
    metrics = {"policy/approxkl_avg": 0.5 * jnp.sum(jnp.square(log_ratio)) / count}
    if rl.algorithm == "rloo":
        log_ratio = jnp.sum(log_ratio, axis=-1)
        policy = policy_loss(log_ratio, batch.advantages[..., 0], rl.cliprange)
        row_losses = jnp.mean(policy.losses, axis=-1)
        loss = jnp.mean(row_losses)
        metrics |= {
            "policy/clipfrac_avg": jnp.mean(policy.clipped.astype(jnp.float32)),
            "val/ratio": jnp.mean(jnp.exp(log_ratio)),
            "loss/policy_avg": loss,
        }
        return LossOutput(loss, metrics, row_losses, {})
    total = lambda x: jnp.sum(jnp.where(mask, x, 0.0), axis=(1, 2))  # noqa: E731  by row
    policy = policy_loss(log_ratio, batch.advantages, rl.cliprange)
    values = value_loss(model.scalar_head(hidden), batch.old_values, batch.returns, rl.cliprange_value)
    losses = total(policy.losses) + rl.vf_coef * total(values.losses)
    metrics |= {
        "policy/clipfrac_avg": jnp.sum(total(policy.clipped)) / count,
        "val/ratio": jnp.sum(total(jnp.exp(log_ratio))) / count,
        "loss/policy_avg": jnp.sum(total(policy.losses)) / count,
        "loss/value_avg": jnp.sum(total(values.losses)) / count,
        "val/clipfrac_avg": jnp.sum(total(values.clipped)) / count,
    }
    return LossOutput(jnp.sum(losses) / count, metrics, losses / jnp.maximum(lengths, 1), {})


def check_reward(config: TrainConfig) -> None:
    """Raises UserError for settings of a reward model that cannot be meant."""
    _frozen_tower(config)


def check_rl(config: TrainConfig) -> None:
    """Raises UserError for settings of a policy-gradient run that cannot be meant."""
    rl: RLConfig = config.rl
    least = 2 if rl.algorithm == "rloo" else 1
    if rl.rloo_k < least:
        raise UserError(
            f"{rl.algorithm} needs at least {least} answers of a prompt, not {rl.rloo_k}", where="train.rl.rloo_k"
        )
    _frozen_tower(config)


def _frozen_tower(config: TrainConfig) -> None:
    if config.train_vision:
        raise UserError("the vision tower learns in sft only", where="train.train_vision", remedy="set false")
