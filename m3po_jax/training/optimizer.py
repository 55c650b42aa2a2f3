"""AdamW with the schedules, clipping and decay mask of the recipes; all of it optax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from m3po_jax.config import TrainConfig
from m3po_jax.reading import check_values

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
        UserError: settings outside their domain.
    """
    check_values(config, "train")
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
