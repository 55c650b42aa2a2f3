"""The measure of what the text alone teaches, as a compiled function beside the training step.

It reads a training batch before its update, without gradient, in the micro-batches of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m3po_jax.hosts.sharding import use_mesh
from m3po_jax.objectives.model_passes import text_only_accuracies
from m3po_jax.training.step import Batch, Parameters, Partition, micro_batches, reference_model


def make_harm_metrics(
    partition: Partition, groups: int, shared: tuple[str, ...], mesh: Mesh
) -> Callable[[Parameters, nnx.State, Parameters | None, Batch], dict[str, jax.Array]]:
    """(trainable, frozen, base, batch) -> `text_only_accuracies`, means over the batch; arguments as of a step.

    Args:
        groups: Micro-batches of a batch, which share its fields `shared`.
    """

    def measure(
        trainable: Parameters, frozen: nnx.State, base: Parameters | None, batch: Any
    ) -> dict[str, jax.Array]:
        def one(group: Any) -> dict[str, jax.Array]:
            model = partition.merge(trainable, frozen)
            reference = reference_model(partition, trainable, frozen, base)
            return text_only_accuracies(model, group, reference_model=reference)

        if groups == 1:
            return one(batch)
        rows, complete = micro_batches(batch, groups, shared)
        return jax.tree.map(jnp.mean, jax.lax.map(lambda group: one(complete(group)), rows))

    jitted = jax.jit(measure, out_shardings=NamedSharding(mesh, PartitionSpec()))  # read as whole numbers anywhere

    def harm_metrics(
        trainable: Parameters, frozen: nnx.State, base: Parameters | None, batch: Batch
    ) -> dict[str, jax.Array]:
        with use_mesh(mesh):
            return jitted(trainable, frozen, base, batch)

    return harm_metrics
