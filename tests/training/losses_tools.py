"""Losses as compiled programs, and log-probs from plain causal passes to compare them with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import TrainConfig
from m3po_jax.data.collation import TreeBatch
from m3po_jax.hosts.sharding import shard_batch
from m3po_jax.models.forward import encode_images, reference_forward
from m3po_jax.objectives.objective import LossContext
from m3po_jax.objectives.registry import objective_of
from m3po_jax.training.step import make_step, place_frozen, split_model


def loss_of(model: Any, batch: Any, config: TrainConfig, **options: Any) -> Any:
    """The loss of the objective that `config` names."""
    return objective_of(config).loss(model, batch, LossContext(**options))


def compiled_loss(model: Any, batch: Any, config: TrainConfig, reference_model: Any = None) -> Any:
    """`loss_of`, compiled as one program."""
    parts = [None if m is None else nnx.split(m) for m in (model, reference_model)]

    @jax.jit
    def run(states: Any, batch: Any) -> Any:
        models = [part and nnx.merge(part[0], state) for part, state in zip(parts, states, strict=True)]
        return loss_of(models[0], batch, config, reference_model=models[1])

    return run([part and part[1] for part in parts], batch)


def recorded(batch: TreeBatch, seed: int = 0) -> TreeBatch:
    """The batch with made-up reference sums."""
    rng = np.random.default_rng(seed)
    return batch._replace(reference=-rng.uniform(5, 30, batch.reference.shape).astype(np.float32))


@jax.jit
def _plain_logits(graph: Any, state: Any, tokens: jax.Array, images: Any) -> jax.Array:
    model = nnx.merge(graph, state)
    mask = jnp.ones(tokens.shape, bool)
    return reference_forward(model, tokens, mask, encode_images(model, images))


def plain_sums(model: Any, batch: TreeBatch) -> jax.Array:
    """Σ log π of each answer from ordinary causal passes over the prompt and that one answer.

    Rows are padded behind the answer, where causal attention cannot look.
    """
    prefixes, answers = batch.prefix_mask.sum(-1), batch.branch_mask.sum(-1)
    rows, branches, t = batch.branch_ids.shape
    tokens = np.zeros((rows, branches, batch.prefix_ids.shape[1] + t), np.int32)
    for row in range(rows):
        p = prefixes[row]
        tokens[row, :, :p] = batch.prefix_ids[row, :p]
        tokens[row, :, p : p + t] = batch.branch_ids[row]
    graph, state = nnx.split(model)
    sums = []
    for branch in range(branches):
        logits = _plain_logits(graph, state, tokens[:, branch], batch.images)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        scores = jnp.take_along_axis(log_probs, tokens[:, branch, 1:, None], axis=-1)[..., 0]
        place = np.arange(1, tokens.shape[-1])
        last = (prefixes + answers[:, branch])[:, None]
        counted = (place >= prefixes[:, None]) & (place < last)
        sums.append(jnp.where(counted, scores, 0.0).sum(-1))
    return jnp.stack(sums, axis=1)


def one_step(model: Any, batch: Any, config: TrainConfig, mesh: Mesh) -> tuple[Any, Any, np.ndarray]:
    partition, trainable, frozen = split_model(model, config)
    step = make_step(partition, trainable, config, total_steps=2, mesh=mesh)
    state, metrics, rows = step(step.init(trainable), place_frozen(frozen, mesh), None, shard_batch(batch, mesh))
    # The first moment after one step is (1 − β1) × the clipped gradient: it shows what the update hides.
    moment = next(s.mu for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s))
    return moment, metrics, np.asarray(rows)


def _is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)
