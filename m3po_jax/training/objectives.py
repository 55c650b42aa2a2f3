"""The objectives by name: what sets each apart from the others, and the checks of its settings.

The loop, the step and the guards are the same for all of them; a new objective is one more entry of `OBJECTIVES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from m3po_jax.config import TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.objectives.divergences import divergence_score
from m3po_jax.objectives.preference import LOSSES, loss_mixture, preference_loss
from m3po_jax.reading import check_values
from m3po_jax.training import losses, rl_losses
from m3po_jax.training.losses import LossOutput, needs_reference_pass, tower_learns


def _no_settings(config: TrainConfig) -> None:
    """Nothing to check beyond what every objective shares."""


def _nothing_known(config: TrainConfig, tolerance: float) -> dict[str, tuple[float, float]]:
    return {}


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        loss: (model, batch, config, *, tokens, reference_model, remat) -> `LossOutput`.
        check: Raises UserError for settings that make no sense.
        uses_reference: The loss compares with a reference, recorded in the batch or computed.
        answer_tokens: Batch -> answer tokens in it, where the loss averages over tokens: what a sum over them is
            divided by, whole or accumulated, unless the step is given another number.
        shared_fields: Fields of a batch that belong to all its rows, so that micro-batches do not divide them.
        whole_model: Every parameter learns, whatever `lora` and `freeze` say.
        needs_first_gradient: A first step without gradient means that nothing can be learned.
        first_values: (config, tolerance of a log-prob sum in nats) -> {metric: (value, tolerance)} known before
            the first update, when the policy is its reference.
    """

    loss: Callable[..., LossOutput]
    check: Callable[[TrainConfig], None] = _no_settings
    uses_reference: bool = False
    answer_tokens: Callable[[Any], jax.Array] | None = None
    shared_fields: tuple[str, ...] = ()
    whole_model: bool = False
    needs_first_gradient: bool = True
    first_values: Callable[[TrainConfig, float], dict[str, tuple[float, float]]] = _nothing_known


def _first_branch_tokens(batch: Any) -> jax.Array:
    return jnp.sum(batch.branch_mask[:, 0], dtype=jnp.float32)


def _all_tokens(batch: Any) -> jax.Array:
    return jnp.sum(batch.branch_mask, dtype=jnp.float32)


def first_preference_values(config: TrainConfig, tolerance: float) -> dict[str, tuple[float, float]]:
    """Values of the preference objective's terms where policy and reference agree: their closed forms, evaluated.

    Every log-ratio is 0 then, so a loss of log-ratios has one value, whatever the answers. Losses that read the
    policy alone (simpo, cpo, orpo, sft) have none, nor has `ld_alpha` on the policy's sums alone. The tolerance of
    a value is how far it moves when both log-ratios of a pair are off by `tolerance` nats in opposite directions.
    """
    found: dict[str, tuple[float, float]] = {}
    mixture = _mixture(config)
    same_sums = config.ld_alpha is None or config.ld_alpha_reference
    of_ratios = all(not LOSSES[name].reference_free and name != "sft" for name in mixture)
    if same_sums and of_ratios:
        ratios = tolerance * jnp.array([0.0, 1.0, -1.0])
        # Each value is computed alone: the coupled losses would sort the three.
        values = [
            float(
                preference_loss(
                    ratio[None],
                    -ratio[None],
                    jnp.zeros(1),
                    jnp.zeros(1),
                    loss_type=config.loss_type,
                    beta=config.beta,
                    label_smoothing=config.label_smoothing,
                    chosen_lengths=jnp.ones(1),
                    rejected_lengths=jnp.ones(1),
                    discopop_tau=config.discopop_tau,
                    loss_weights=config.loss_weights,
                    f_divergence_type=config.f_divergence_type,
                    f_alpha_divergence_coef=config.f_alpha_divergence_coef,
                )[0][0]
            )
            for ratio in ratios
        ]
        found["loss/preference"] = (values[0], max(abs(value - values[0]) for value in values) + 1e-5)
    if config.anchor_weight:
        found["loss/anchor"] = (_softplus(config.anchor_delta), config.beta * tolerance + 1e-5)
    return found


def _softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def check_objective(config: TrainConfig) -> Objective:
    """The objective of a recipe, once the settings that concern it are known to make sense.

    Raises:
        UserError: see the messages.
    """
    check_values(config, "train")
    if config.batch_size % config.gradient_accumulation_steps:
        raise UserError(
            f"batch_size {config.batch_size} does not divide into {config.gradient_accumulation_steps} parts",
            where="train.gradient_accumulation_steps",
        )
    objective = OBJECTIVES[config.objective]
    objective.check(config)
    return objective


def _mixture(config: TrainConfig) -> dict[str, float]:
    return loss_mixture(
        config.loss_type,
        config.loss_weights,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        f_divergence_type=config.f_divergence_type,
        discopop_tau=config.discopop_tau,
        simpo_gamma=config.simpo_gamma,
    )


def _check_preference(config: TrainConfig) -> None:
    mixture = _mixture(config)
    divergence_score(config.f_divergence_type, config.f_alpha_divergence_coef)
    if config.train_vision:
        raise UserError(
            "the whole vision tower learns in sft only",
            where="train.train_vision",
            remedy="set false, or adapt it: train.lora.target_modules=[vision_tower.q_proj, …]",
        )
    if tower_learns(config) and (config.conditional_weight or config.harm_metrics_steps):
        raise UserError(
            "conditional_weight and harm_metrics_steps need a frozen vision tower",
            where="train.lora.target_modules",
            remedy="leave vision_tower.* out",
        )
    if config.ld_alpha is not None:
        for name in mixture:
            if LOSSES[name].reference_free:
                raise UserError(f"ld_alpha has no meaning for loss {name!r}", where="train.ld_alpha")
    swaps = config.conditional_weight > 0 and config.conditional_image == "swap"
    if swaps and config.batch_size < 2:
        raise UserError("no other row's image in a batch of one", where="train.conditional_image", remedy="blank")
    if config.gradient_accumulation_steps > 1:
        coupled = [f"loss {name!r}" for name in mixture if LOSSES[name].coupled]
        coupled += ["conditional_image 'swap'"] if swaps else []
        if coupled:
            raise UserError(
                f"{coupled[0]} couples the rows of a batch and cannot be accumulated",
                where="train.gradient_accumulation_steps",
                remedy="set it to 1",
            )
    only_adapters = config.lora.lora_rank > 0 and not config.lora.train_projector
    if needs_reference_pass(config) and config.reference == "recorded" and not only_adapters:
        raise UserError(
            "ld_alpha, conditional_weight and harm_metrics_steps need the reference model, and more than adapters "
            "is trained",
            where="train.reference",
            remedy="set it to computed",
        )


OBJECTIVES: dict[str, Objective] = {
    "preference": Objective(
        losses.preference,
        _check_preference,
        uses_reference=True,
        answer_tokens=_first_branch_tokens,
        shared_fields=("blank_features",),
        first_values=first_preference_values,
    ),
    "sft": Objective(losses.sft, answer_tokens=_first_branch_tokens, shared_fields=("blank_features",)),
    "reward": Objective(rl_losses.reward, rl_losses.check_reward),
    # Answers of equal reward give no gradient, and the next rollout may have others.
    "rlhf": Objective(
        rl_losses.policy_gradient, rl_losses.check_rl, answer_tokens=_all_tokens, needs_first_gradient=False
    ),
    # Every image is compared with every text, in whichever micro-batch it is.
    "contrastive": Objective(losses.contrastive, shared_fields=("text_ids", "text_mask"), whole_model=True),
}
