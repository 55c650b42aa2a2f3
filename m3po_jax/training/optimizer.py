"""AdamW with the schedules, clipping and decay mask of the recipes; all of it optax."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The keys under `train` that an update depends on."""

    learning_rate: float
    lr_schedule: str
    warmup_ratio: float
    warmup_steps: int | None
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float

    @classmethod
    def of(cls, config: TrainConfig) -> OptimizerSettings:
        """
        Raises:
            UserError: settings outside their domain.
        """
        check_values(config, "train")
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def learning_rate_schedule(settings: OptimizerSettings, total_steps: int) -> optax.Schedule:
    """Learning rate of update 0 … total_steps − 1.

    The warm-up rises as (step + 1) / warmup, and the decay ends one step before it would reach 0, so that no
    update is spent at rate 0 (Hugging Face's schedules spend the first one).
    """
    ratio_steps = warmup_steps(settings.warmup_ratio, total_steps)
    warmup = ratio_steps if settings.warmup_steps is None else settings.warmup_steps
    shape = SCHEDULES[settings.lr_schedule]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        return settings.learning_rate * jnp.where(step < warmup, rising, shape(progress))

    return schedule


def decay_mask(axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, bool]:
    """Which parameters decay: those with two or more axes, stacked layers apart (no norms, no biases)."""
    return {name: sum(axis != "layers" for axis in names) >= 2 for name, names in axes.items()}


def make_optimizer(
    settings: OptimizerSettings, total_steps: int, axes: Mapping[str, tuple[str | None, ...]]
) -> optax.GradientTransformation:
    """Clipping by the global norm (0: off), then AdamW with the recipe's β₁, β₂ and ε on a dict of float32 arrays.

    Args:
        axes: Logical axes of each trainable parameter, by its path.
    """
    clip = optax.clip_by_global_norm(settings.max_grad_norm) if settings.max_grad_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate_schedule(settings, total_steps),
            b1=settings.adam_beta1,
            b2=settings.adam_beta2,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            mask=decay_mask(axes),
        ),
    )
