"""The objective `reward`: the pairwise logistic loss of reward models.

Bradley and Terry; Ouyang et al., arXiv:2203.02155, eq. 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.batches import pair_batches
from m3po_jax.data.collation import TreeBatch
from m3po_jax.data.pair_rows import PairRows
from m3po_jax.models.forward import encode_images
from m3po_jax.models.heads import answer_rewards
from m3po_jax.objectives.model_passes import branch_inputs
from m3po_jax.objectives.objective import (
    BATCH_ALONE,
    Learner,
    LossContext,
    LossOutput,
    Objective,
    Reads,
    check_frozen_tower,
)


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


@dataclasses.dataclass(frozen=True)
class Reward(Objective):
    """Learns to give chosen answers (branch 0) more than rejected ones (branch 1)."""

    center_rewards_coefficient: float
    reward_margin: float

    name: ClassVar[str] = "reward"
    learner: ClassVar[Learner] = Learner.REWARD_MODEL
    draws_candidates: ClassVar[bool] = True
    unread: ClassVar[tuple[str, ...]] = ("lm_head",)  # a reward is read from the hidden state

    def loss(self, model: Any, batch: TreeBatch, context: LossContext = BATCH_ALONE) -> LossOutput:
        """The pairwise logistic loss, nats per pair; TRL's metrics."""
        images = encode_images(model, batch.images, remat=context.remat)
        rewards = answer_rewards(
            model, *branch_inputs(batch, images), remat=context.remat, base_learns=self.base_learns
        )
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        losses = reward_loss(
            chosen,
            rejected,
            center_rewards_coefficient=self.center_rewards_coefficient,
            margin=self.reward_margin,
        )
        metrics = {
            "accuracy": jnp.mean((chosen > rejected).astype(jnp.float32)),
            "margin": jnp.mean(chosen - rejected),
            "min_reward": jnp.min(rewards),
            "mean_reward": jnp.mean(rewards),
            "max_reward": jnp.max(rewards),
        }
        return LossOutput(jnp.mean(losses), metrics, losses, {})

    def check(self, config: TrainConfig) -> None:
        super().check(config)
        check_frozen_tower(config)

    @property
    def reads(self) -> Reads:
        return Reads.REWARD_PAIRS

    def batches_of_pairs(self, pairs: PairRows, processor: Any, *, where: str, **options: Any) -> BatchSource[Any]:
        return pair_batches(pairs, processor, where=where, **options)

    def description(self, rule: str, judge: str) -> tuple[str, list[str]]:
        return "reward modelling on pairs", ["reward-model"]
