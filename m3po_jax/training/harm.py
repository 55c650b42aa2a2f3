"""The measure of what the text alone teaches, as a compiled function beside the training step.

It reads a training batch before its update, without gradient, in the micro-batches of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import TrainConfig
from m3po_jax.sharding import use_mesh
from m3po_jax.training.losses import text_only_accuracies
from m3po_jax.training.step import Batch, Parameters, Partition


def make_harm_metrics(
    partition: Partition, config: TrainConfig, mesh: Mesh
) -> Callable[[Parameters, nnx.State, Parameters | None, Batch], dict[str, jax.Array]]:
    """(trainable, frozen, base, batch) -> `text_only_accuracies`, means over the batch; arguments as of a step."""
    groups = config.gradient_accumulation_steps

    def measure(
        trainable: Parameters, frozen: nnx.State, base: Parameters | None, batch: Any
    ) -> dict[str, jax.Array]:
        def one(group: Any) -> dict[str, jax.Array]:
            model = partition.merge(trainable, frozen)
            reference = partition.merge({**trainable, **(base or {})}, frozen)
            return text_only_accuracies(model, group, reference_model=reference)

        if groups == 1:
            return one(batch)
        # Group a holds rows a, a + groups, …, as in the step: each device keeps its own rows.
        rows = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, groups, *x.shape[1:]), 1, 0), batch)
        return jax.tree.map(jnp.mean, jax.lax.map(one, rows))

    jitted = jax.jit(measure)

    def harm_metrics(
        trainable: Parameters, frozen: nnx.State, base: Parameters | None, batch: Batch
    ) -> dict[str, jax.Array]:
        with use_mesh(mesh):
            return jitted(trainable, frozen, base, batch)

    return harm_metrics
