"""One optimizer step: jitted, donated, sharded, with exact gradient accumulation.

The model is split into trainable leaves (a flat dict of float32 arrays by dotted path) and frozen ones. Only
the `TrainState` is donated and checkpointed; frozen weights are a plain argument, shared by every step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from m3po_jax.config import LoRAConfig, RLConfig, TrainConfig
from m3po_jax.data.batches import ContrastiveBatch, TreeBatch
from m3po_jax.errors import UserError
from m3po_jax.models.heads import HEAD
from m3po_jax.models.layers import LoRAParam
from m3po_jax.sharding import AXES, Axes, sharding_for, state_shardings, use_mesh
from m3po_jax.training.losses import LossOutput, check_objective
from m3po_jax.training.optimizer import learning_rate_schedule, make_optimizer
from m3po_jax.training.rl_losses import RolloutBatch

Parameters = dict[str, jax.Array]
Batch = TreeBatch | ContrastiveBatch | RolloutBatch


class TrainState(NamedTuple):
    """Everything that changes from step to step; `step` counts finished updates."""

    step: Int[Array, ""]
    trainable: Parameters
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a model comes apart into trainable and frozen leaves, and how it is put together again."""

    graphdef: nnx.GraphDef
    names: tuple[str, ...]
    paths: tuple[tuple[Any, ...], ...]
    axes: tuple[Axes, ...]
    adapters: tuple[bool, ...]  # which leaves are LoRA factors

    def merge(self, trainable: Parameters, frozen: nnx.State) -> Any:
        leaves = [(path, trainable[name]) for name, path in zip(self.names, self.paths, strict=True)]
        return nnx.merge(self.graphdef, nnx.from_flat_state(leaves), frozen)

    @property
    def axes_by_name(self) -> dict[str, Axes]:
        return dict(zip(self.names, self.axes, strict=True))

    def base_weights(self, trainable: Parameters) -> Parameters:
        """The trainable leaves that are no adapters: at the start, they belong to the reference."""
        return {name: trainable[name] for name, adapter in zip(self.names, self.adapters, strict=True) if not adapter}


def trainable_filter(config: TrainConfig, objective: str | None = None) -> Callable[[Any, Any], bool]:
    """An nnx filter of what learns under `config`.

    - contrastive: every parameter of the dual encoder;
    - `lora_rank` > 0: the adapters, plus the projector with `train_projector`;
    - `lora_rank` 0: decoder and projector (full fine-tuning);
    - `train_vision` adds the vision tower, which is frozen otherwise;
    - a scalar head (reward or value) always.
    """
    objective = objective or config.objective

    def trains(path: Any, value: Any) -> bool:
        if not isinstance(value, nnx.Variable) or not issubclass(value.type, nnx.Param):
            return False
        if objective == "contrastive":
            return True
        if path[0] == "vision_tower":
            return config.train_vision
        if config.lora.lora_rank == 0 or path[0] == HEAD:
            return True
        return issubclass(value.type, LoRAParam) or (path[0] == "projector" and config.lora.train_projector)

    return trains


def split_model(model: nnx.Module, config: TrainConfig) -> tuple[Partition, Parameters, nnx.State]:
    """(partition, trainable leaves as float32 copies, frozen leaves as they are).

    Raises:
        UserError: nothing would be trained.
    """
    graphdef, trainable, frozen = nnx.split(model, trainable_filter(config), ...)
    flat = nnx.to_flat_state(trainable)
    if not flat:
        raise UserError(
            "no parameter is trainable",
            where="train",
            remedy="attach adapters (train.lora.lora_rank) or set it to 0 for full fine-tuning",
        )
    names, paths, axes, adapters, arrays = [], [], [], [], {}
    for path, variable in flat:
        name = ".".join(str(part) for part in path)
        names.append(name)
        paths.append(path)
        axes.append(tuple(variable.get_metadata().get("axes") or (None,) * len(variable.shape)))
        adapters.append(issubclass(variable.type, LoRAParam))
        # A copy even of float32 leaves: the state is donated, and the caller's model must survive.
        arrays[name] = jnp.array(variable[...], dtype=jnp.float32, copy=True)
    return Partition(graphdef, tuple(names), tuple(paths), tuple(axes), tuple(adapters)), arrays, frozen


def _micro_batches(batch: Batch, count: int) -> tuple[Batch, Callable[[Batch], Batch]]:
    """The batch with its rows in `count` groups [count, rows / count, …], and a function that completes a
    group.

    Group a holds rows a, a + count, …: each device then keeps its own rows.
    """

    def split(x: jax.Array) -> jax.Array:
        groups = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return groups
        rows = AXES[:2] if groups.shape[1] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
        return jax.lax.with_sharding_constraint(groups, P(None, rows))

    if isinstance(batch, ContrastiveBatch):
        # Every image is compared with every text, in whichever group it is.
        texts = {"text_ids": batch.text_ids, "text_mask": batch.text_mask}
        rows = batch._replace(text_ids=None, text_mask=None)
        return jax.tree.map(split, rows), lambda group: group._replace(**texts)
    return jax.tree.map(split, batch), lambda group: group


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """Compiled functions of one training stage; see `make_step`."""

    mesh: Mesh
    optimizer: optax.GradientTransformation
    shardings: Any  # a TrainState of shardings
    jitted: Any

    def init(self, trainable: Parameters) -> TrainState:
        """Step 0, placed on the mesh; `trainable` is consumed."""
        placed = jax.device_put(trainable, self.shardings.trainable)
        optimizer = jax.jit(self.optimizer.init, out_shardings=self.shardings.optimizer)(placed)
        step = jax.device_put(jnp.zeros((), jnp.int32), self.shardings.step)
        return TrainState(step, placed, optimizer)

    def __call__(
        self, state: TrainState, frozen: nnx.State, base: Parameters | None, batch: Batch
    ) -> tuple[TrainState, dict[str, Float[Array, ""]], Float[Array, " b"]]:
        """(next state, metrics, loss per row). `state` is donated: do not touch it afterwards."""
        with use_mesh(self.mesh):
            return self.jitted(state, frozen, base, batch)

    @property
    def compilations(self) -> int:
        """How many batch shapes were compiled so far."""
        return self.jitted._cache_size()


def make_step(
    partition: Partition,
    trainable: Parameters,
    config: TrainConfig,
    *,
    total_steps: int,
    mesh: Mesh,
    remat: str = "none",
    compute_reference: bool = False,
) -> TrainStep:
    """The training step of `config` for a model split as in `partition`.

    Equal arguments give the same compiled step, so that the rounds and arms of one process share
    compilations.

    Args:
        trainable: Only shapes are read.
        compute_reference: Preference objective: run the reference model too. It consists of the frozen leaves
            and of the `base` leaves given to each call (`Partition.base_weights` at the start), adapters off.
    """
    shapes = tuple(trainable[name].shape for name in partition.names)
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return _make_step(
        partition,
        shapes,
        settings,
        total_steps=total_steps,
        mesh=mesh,
        remat=remat,
        compute_reference=compute_reference,
    )


@functools.lru_cache(maxsize=8)
def _make_step(
    partition: Partition,
    shapes: tuple[tuple[int, ...], ...],
    settings: str,
    *,
    total_steps: int,
    mesh: Mesh,
    remat: str,
    compute_reference: bool,
) -> TrainStep:
    raw = json.loads(settings)
    config = TrainConfig(**{**raw, "lora": LoRAConfig(**raw["lora"]), "rl": RLConfig(**raw["rl"])})
    objective = check_objective(config)
    optimizer = make_optimizer(config, total_steps, partition.axes_by_name)
    schedule = learning_rate_schedule(config, total_steps)
    groups = config.gradient_accumulation_steps

    def loss_of(
        trainable: Parameters, frozen: nnx.State, base: Parameters | None, batch: Batch, tokens: Any
    ) -> tuple[jax.Array, LossOutput]:
        model = partition.merge(trainable, frozen)
        reference = None
        if compute_reference:
            reference = partition.merge(jax.lax.stop_gradient({**trainable, **(base or {})}), frozen)
        out = objective(model, batch, config, tokens=tokens, reference_model=reference, remat=remat)
        return out.loss, out

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

    def gradients(
        trainable: Parameters, frozen: nnx.State, base: Parameters | None, batch: Batch
    ) -> tuple[LossOutput, Parameters]:
        if groups == 1:
            (_, out), grads = value_and_grad(trainable, frozen, base, batch, None)
            return out, grads
        tokens = None
        if isinstance(batch, TreeBatch):
            tokens = jnp.sum(batch.branch_mask[:, 0], dtype=jnp.float32) / groups
        elif isinstance(batch, RolloutBatch):
            tokens = jnp.sum(batch.branch_mask, dtype=jnp.float32) / groups
        rows, complete = _micro_batches(batch, groups)

        def accumulate(total: Parameters, group: Any) -> tuple[Parameters, LossOutput]:
            (_, out), grads = value_and_grad(trainable, frozen, base, complete(group), tokens)
            return jax.tree.map(jnp.add, total, grads), out

        total, outs = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, trainable), rows)
        mean = lambda x: jnp.mean(x, axis=0)  # noqa: E731
        out = LossOutput(mean(outs.loss), jax.tree.map(mean, outs.metrics), outs.row_losses.T.reshape(-1))
        return out, jax.tree.map(lambda x: x / groups, total)

    def step(
        state: TrainState, frozen: nnx.State, base: Parameters | None, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
        out, grads = gradients(state.trainable, frozen, base, batch)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": out.loss,
            **out.metrics,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, trainable, optimizer_state), metrics, out.row_losses

    shardings = _shardings(partition, shapes, optimizer, mesh)
    whole = NamedSharding(mesh, P())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole, whole))
    return TrainStep(mesh, optimizer, shardings, jitted)


def _shardings(
    partition: Partition,
    shapes: tuple[tuple[int, ...], ...],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Any:
    """Shardings of a `TrainState`: moments like their parameters, counters on every device."""
    whole = NamedSharding(mesh, P())
    parameters = {
        name: sharding_for(axes, shape, mesh)
        for name, axes, shape in zip(partition.names, partition.axes, shapes, strict=True)
    }
    abstract = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in zip(partition.names, shapes, strict=True)
    }
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract),
        parameters,
        transform_non_params=lambda _: whole,
    )
    leaves: tuple[Any, ...] = (whole, parameters, moments)
    return TrainState(*leaves)


def place_frozen(frozen: nnx.State, mesh: Mesh) -> nnx.State:
    """Frozen leaves on their shardings (no copy for those already there)."""
    return jax.device_put(frozen, state_shardings(frozen, mesh))


def place_trainable(partition: Partition, trainable: Parameters, mesh: Mesh) -> Parameters:
    """Trainable leaves on their shardings."""
    axes = partition.axes_by_name
    return {
        name: jax.device_put(value, sharding_for(axes[name], value.shape, mesh)) for name, value in trainable.items()
    }
