"""The objective `rlhf`: the policy learns from a reward model's opinion of its own answers, by RLOO or PPO."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from m3po_jax.config import RLConfig, TrainConfig
from m3po_jax.data.model_images import Images
from m3po_jax.errors import UserError
from m3po_jax.models.forward import branch_hidden, encode_images, states_scores
from m3po_jax.objectives import policy_gradient as pg
from m3po_jax.objectives.model_passes import answer_log_probs, branch_inputs
from m3po_jax.objectives.objective import BATCH_ALONE, LossContext, LossOutput, Objective, Reads, check_frozen_tower

Answers = Float[Array, "b k"]
Tokens = Float[Array, "b k t"]
TokenMask = Bool[Array, "b k t"]


class RolloutBatch(NamedTuple):
    """Prompts with the K answers that the policy gave, what it thought of their tokens, and what they earned.

    The first seven fields are those of a `TreeBatch`; `reference` is not read. Per token: `old_log_probs` in nats as
    recorded at sampling, `advantages` (of RLOO: that of the whole answer at every token), and for PPO `old_values`
    and `returns` (else zeros).
    """

    prefix_ids: Int[Any, "b p"]
    prefix_mask: Bool[Any, "b p"]
    images: Images | None
    branch_ids: Int[Any, "b k t"]
    branch_mask: Bool[Any, "b k t"]
    reference: Float[Any, "b k"]
    row_index: Int[Any, " b"]
    old_log_probs: Float[Any, "b k t"]
    advantages: Float[Any, "b k t"]
    old_values: Float[Any, "b k t"]
    returns: Float[Any, "b k t"]

    @property
    def masks(self) -> tuple[np.ndarray, ...]:
        """What is no padding, of a batch on the host."""
        return self.prefix_mask, self.branch_mask


@dataclasses.dataclass(frozen=True)
class Algorithm(ABC):
    """How rewards become a loss; fields are keys under `train.rl`.

    Attributes:
        least_answers: Of a prompt in a rollout.
        learns_values: A value head learns beside the policy.
    """

    cliprange: float

    name: ClassVar[str]
    least_answers: ClassVar[int] = 1
    learns_values: ClassVar[bool] = False

    @classmethod
    def of(cls, rl: RLConfig) -> Self:
        return cls(**{field.name: getattr(rl, field.name) for field in dataclasses.fields(cls)})

    @abstractmethod
    def advantages(
        self, scores: Answers, penalties: Tokens, values: Tokens, mask: TokenMask
    ) -> tuple[Tokens, Tokens]:
        """(advantages, returns) of the tokens of a rollout, from scores of answers and the KL penalties of tokens."""

    @abstractmethod
    def loss(
        self, model: Any, batch: RolloutBatch, *, count: Num[Array, ""], remat: str, base_learns: bool
    ) -> LossOutput:
        """The clipped loss of a batch; a row's loss is the mean over its answers or tokens.

        Args:
            count: What sums over tokens are divided by.
        """


@dataclasses.dataclass(frozen=True)
class Rloo(Algorithm):
    """A whole answer is one action, of one ratio; the baseline is the mean reward of its prompt's other answers."""

    normalize_advantages: bool

    name: ClassVar[str] = "rloo"
    least_answers: ClassVar[int] = 2

    def advantages(
        self, scores: Answers, penalties: Tokens, values: Tokens, mask: TokenMask
    ) -> tuple[Tokens, Tokens]:
        """Each answer's at every one of its tokens; there are no returns."""
        rewards = scores + jnp.sum(penalties, axis=-1)
        per_answer = pg.rloo_advantages(rewards, normalize=self.normalize_advantages)
        advantages = jnp.where(mask, per_answer[..., None], 0.0)
        return advantages, jnp.zeros_like(advantages)

    def loss(
        self, model: Any, batch: RolloutBatch, *, count: Num[Array, ""], remat: str, base_learns: bool
    ) -> LossOutput:
        images = encode_images(model, batch.images, remat=remat)
        log_probs = answer_log_probs(model, batch, images, remat=remat, base_learns=base_learns)
        token_ratios = jnp.where(batch.branch_mask, log_probs - batch.old_log_probs, 0.0)
        log_ratio = jnp.sum(token_ratios, axis=-1)
        policy = pg.policy_loss(log_ratio, batch.advantages[..., 0], self.cliprange)
        row_losses = jnp.mean(policy.losses, axis=-1)
        loss = jnp.mean(row_losses)
        metrics = {
            "policy/approxkl_avg": _approximate_kl(token_ratios, count),
            "policy/clipfrac_avg": jnp.mean(policy.clipped.astype(jnp.float32)),
            "val/ratio": jnp.mean(jnp.exp(log_ratio)),
            "loss/policy_avg": loss,
        }
        return LossOutput(loss, metrics, row_losses, {})


@dataclasses.dataclass(frozen=True)
class Ppo(Algorithm):
    """Every token is an action; the baseline is a value head, and its loss × `vf_coef` is added."""

    gamma: float
    lam: float
    vf_coef: float
    cliprange_value: float
    whiten_rewards: bool

    name: ClassVar[str] = "ppo"
    learns_values: ClassVar[bool] = True

    def advantages(
        self, scores: Answers, penalties: Tokens, values: Tokens, mask: TokenMask
    ) -> tuple[Tokens, Tokens]:
        rewards = pg.token_rewards(scores, penalties, mask)
        if self.whiten_rewards:
            rewards = pg.whiten(rewards, mask, shift_mean=False)
        advantages, returns = pg.gae(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        return pg.whiten(advantages, mask), returns

    def loss(
        self, model: Any, batch: RolloutBatch, *, count: Num[Array, ""], remat: str, base_learns: bool
    ) -> LossOutput:
        mask, images = batch.branch_mask, encode_images(model, batch.images, remat=remat)
        hidden = branch_hidden(model, *branch_inputs(batch, images), remat=remat, base_learns=base_learns)
        log_probs = states_scores(model, hidden, batch.branch_ids).log_probs
        log_ratio = jnp.where(mask, log_probs - batch.old_log_probs, 0.0)

        def total(x: Shaped[Array, "b k t"]) -> Float[Array, " b"]:
            return jnp.sum(jnp.where(mask, x, 0.0), axis=(1, 2))

        policy = pg.policy_loss(log_ratio, batch.advantages, self.cliprange)
        values = pg.value_loss(model.scalar_head(hidden), batch.old_values, batch.returns, self.cliprange_value)
        losses = total(policy.losses) + self.vf_coef * total(values.losses)
        metrics = {
            "policy/approxkl_avg": _approximate_kl(log_ratio, count),
            "policy/clipfrac_avg": jnp.sum(total(policy.clipped)) / count,
            "val/ratio": jnp.sum(total(jnp.exp(log_ratio))) / count,
            "loss/policy_avg": jnp.sum(total(policy.losses)) / count,
            "loss/value_avg": jnp.sum(total(values.losses)) / count,
            "val/clipfrac_avg": jnp.sum(total(values.clipped)) / count,
        }
        lengths = jnp.maximum(jnp.sum(mask, axis=(1, 2)), 1)
        return LossOutput(jnp.sum(losses) / count, metrics, losses / lengths, {})


def _approximate_kl(log_ratio: Tokens, count: Num[Array, ""]) -> Float[Array, ""]:
    """TRL's ``policy/approxkl_avg``, of tokens."""
    return 0.5 * jnp.sum(jnp.square(log_ratio)) / count


ALGORITHMS: dict[str, type[Algorithm]] = {algorithm.name: algorithm for algorithm in (Rloo, Ppo)}


def algorithm_of(rl: RLConfig) -> Algorithm:
    """The algorithm that `train.rl` names, with its settings."""
    return ALGORITHMS[rl.algorithm].of(rl)


@dataclasses.dataclass(frozen=True)
class Rlhf(Objective):
    """Learns from rewards of the policy's own answers; the KL penalty is in their advantages already."""

    algorithm: Algorithm

    name: ClassVar[str] = "rlhf"
    draws_candidates: ClassVar[bool] = True
    # Answers of equal reward give no gradient, and the next rollout may have others.
    needs_first_gradient: ClassVar[bool] = False

    @classmethod
    def _settings(cls, config: TrainConfig) -> dict[str, Any]:
        return {"algorithm": algorithm_of(config.rl)}

    def loss(self, model: Any, batch: RolloutBatch, context: LossContext = BATCH_ALONE) -> LossOutput:
        count = context.denominator(jnp.sum(batch.branch_mask))
        return self.algorithm.loss(model, batch, count=count, remat=context.remat, base_learns=self.base_learns)

    def answer_tokens(self, batch: Any) -> jax.Array | None:
        return jnp.sum(batch.branch_mask, dtype=jnp.float32)

    def check(self, config: TrainConfig) -> None:
        super().check(config)
        least = self.algorithm.least_answers
        if config.rl.rloo_k < least:
            raise UserError(
                f"{self.algorithm.name} needs at least {least} answers of a prompt, not {config.rl.rloo_k}",
                where="train.rl.rloo_k",
            )
        check_frozen_tower(config)

    @property
    def reads(self) -> Reads:
        return Reads.PROMPTS

    def description(self, rule: str, judge: str) -> tuple[str, list[str]]:
        name = self.algorithm.name
        return f"reinforcement learning on a reward model (`{name}`)", ["rlhf", name]
