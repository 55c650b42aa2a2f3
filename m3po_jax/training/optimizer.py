"""AdamW with the schedules, clipping and decay mask of the recipes; all of it optax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from m3po_jax.config import TrainConfig
from m3po_jax.errors import UserError, nearest

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    # Share of the peak rate, from progress after the warm-up in [0, 1).
    "constant": jnp.ones_like,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
}


def warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    return math.ceil(warmup_ratio * total_steps)


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update 0 … total_steps − 1.

    The warm-up rises as (step + 1) / warmup, and the decay ends one step before it would reach 0, so that no
    update is spent at rate 0 (Hugging Face's schedules spend the first one).

    Raises:
        UserError: unknown `lr_schedule`, or settings outside their domain.
    """
    if config.lr_schedule not in SCHEDULES:
        raise UserError(
            f"unknown lr_schedule {config.lr_schedule!r}{nearest(config.lr_schedule, SCHEDULES)}",
            where="train.lr_schedule",
        )
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UserError(f"learning_rate must be positive, not {config.learning_rate}", where="train.learning_rate")
    if not 0 <= config.warmup_ratio <= 1:
        raise UserError(f"warmup_ratio must lie in [0, 1], not {config.warmup_ratio}", where="train.warmup_ratio")
    if config.warmup_steps is not None and config.warmup_steps < 0:
        raise UserError(f"warmup_steps must not be negative: {config.warmup_steps}", where="train.warmup_steps")
    ratio_steps = warmup_steps(config.warmup_ratio, total_steps)
    warmup = ratio_steps if config.warmup_steps is None else config.warmup_steps
    shape = SCHEDULES[config.lr_schedule]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        return config.learning_rate * jnp.where(step < warmup, rising, shape(progress))

    return schedule


def decay_mask(axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, bool]:
    """Which parameters decay: those with two or more axes, stacked layers apart (no norms, no biases)."""
    return {name: sum(axis != "layers" for axis in names) >= 2 for name, names in axes.items()}


def make_optimizer(
    config: TrainConfig, total_steps: int, axes: Mapping[str, tuple[str | None, ...]]
) -> optax.GradientTransformation:
    """Clipping by the global norm (0: off), then AdamW with the recipe's β₁, β₂ and ε on a dict of float32 arrays.

    Args:
        axes: Logical axes of each trainable parameter, by its path.
    """
    if config.max_grad_norm < 0:
        raise UserError(
            f"max_grad_norm must not be negative, not {config.max_grad_norm}", where="train.max_grad_norm"
        )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(
                f"{name} must be at least 0 and below 1, not {getattr(config, name)}", where=f"train.{name}"
            )
    if config.adam_epsilon <= 0:
        raise UserError(f"adam_epsilon must be above 0, not {config.adam_epsilon}", where="train.adam_epsilon")
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.adam_beta1,
            b2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask(axes),
        ),
    )
