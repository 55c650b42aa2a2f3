"""One optimizer step: jitted, donated, sharded, with exact gradient accumulation.

The model is split into trainable leaves (a flat dict of float32 arrays by dotted path) and frozen ones. Only
the `TrainState` is donated and checkpointed; frozen weights are a plain argument, shared by every step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from m3po_jax.config import TrainConfig
from m3po_jax.data.collation import TreeBatch
from m3po_jax.data.contrastive import ContrastiveBatch
from m3po_jax.errors import UserError, nearest
from m3po_jax.hosts.sharding import AXES, Axes, describe, sharding_for, state_shardings, use_mesh
from m3po_jax.models import lora
from m3po_jax.models.forward import PROJECTOR, VISION_TOWER
from m3po_jax.models.heads import HEAD
from m3po_jax.models.layers import LoRAParam
from m3po_jax.objectives.objective import LossContext, LossOutput, Objective
from m3po_jax.objectives.registry import check_objective
from m3po_jax.objectives.rlhf import RolloutBatch
from m3po_jax.training.optimizer import OptimizerSettings, learning_rate_schedule, make_optimizer

Parameters = dict[str, jax.Array]
Batch = TreeBatch | ContrastiveBatch | RolloutBatch


class TrainState(NamedTuple):
    """Everything that changes from step to step; `step` counts finished updates."""

    step: Int[Array, ""]
    trainable: Parameters
    optimizer: optax.OptState
    ema: Parameters  # a moving average of `trainable`; empty where none is kept


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

    @property
    def adapters_by_name(self) -> dict[str, bool]:
        return dict(zip(self.names, self.adapters, strict=True))

    def base_weights(self, trainable: Parameters) -> Parameters:
        """The trainable leaves that are no adapters: at the start, they belong to the reference model."""
        return {name: trainable[name] for name, adapter in zip(self.names, self.adapters, strict=True) if not adapter}


def trainable_filter(config: TrainConfig) -> Callable[[Any, Any], bool]:
    """An nnx filter of what learns under `config`.

    - contrastive: every parameter of the dual encoder;
    - `lora_rank` > 0: the adapters, wherever they are, plus the projector with `train_projector`;
    - `lora_rank` 0: everything but the parts in `freeze` (full fine-tuning; the projector alone with
      ``freeze: [decoder]``); for a reward model without the head over the vocabulary, which it does not read;
    - `train_vision` adds the vision tower, which is frozen otherwise;
    - a scalar head (reward or value) always.
    """
    objective = check_objective(config)

    def trains(path: Any, value: Any) -> bool:
        if not isinstance(value, nnx.Variable) or not issubclass(value.type, nnx.Param):
            return False
        if objective.whole_model or issubclass(value.type, LoRAParam) or path[0] == HEAD:
            return True
        if path[0] == VISION_TOWER:
            return config.train_vision
        if config.lora.lora_rank == 0:
            return path[0] not in config.freeze and not any(layer in path for layer in objective.unread)
        return path[0] == PROJECTOR and config.lora.train_projector

    return trains


def split_model(model: nnx.Module, config: TrainConfig) -> tuple[Partition, Parameters, nnx.State]:
    """(partition, trainable leaves as float32 copies, frozen leaves as they are).

    Raises:
        UserError: nothing would be trained.
    """
    parts = sorted({str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(model))})
    for name in config.freeze:
        if name not in parts:
            raise UserError(f"the model has no part {name!r}{nearest(name, parts)}", where="train.freeze")
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


def reference_model(partition: Partition, trainable: Parameters, frozen: nnx.State, base: Parameters | None) -> Any:
    """The model that the policy is compared with, without gradient: `base` in place of the same leaves.

    Its adapters are switched off, unless `base` has adapters of its own (the policy of an earlier round).
    """
    base = base or {}
    model = partition.merge(jax.lax.stop_gradient({**trainable, **base}), frozen)
    if not any(adapter and name in base for name, adapter in zip(partition.names, partition.adapters, strict=True)):
        lora.set_scale(model, 0.0)
    return model


def micro_batches(batch: Any, count: int, shared: tuple[str, ...]) -> tuple[Any, Callable[[Any], Any]]:
    """The batch with its rows in `count` groups [count, rows / count, …], and a function that completes a
    group with the fields `shared`, which belong to all rows.

    Group a holds rows a, a + count, …: each device then keeps its own rows.
    """

    def split(x: jax.Array) -> jax.Array:
        groups = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return groups
        rows = AXES[:2] if groups.shape[1] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
        return jax.lax.with_sharding_constraint(groups, P(None, rows))

    common = {name: getattr(batch, name) for name in shared}
    rows = batch._replace(**dict.fromkeys(shared))
    return jax.tree.map(split, rows), lambda group: group._replace(**common)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """Compiled functions of one training stage; see `make_step`."""

    mesh: Mesh
    optimizer: optax.GradientTransformation
    shardings: Any  # a TrainState of shardings
    jitted: Any
    keeps_ema: bool = False

    def init(self, trainable: Parameters) -> TrainState:
        """Step 0, placed on the mesh; `trainable` is consumed."""
        placed = jax.device_put(trainable, self.shardings.trainable)
        optimizer = jax.jit(self.optimizer.init, out_shardings=self.shardings.optimizer)(placed)
        step = jax.device_put(jnp.zeros((), jnp.int32), self.shardings.step)
        ema = jax.tree.map(jnp.copy, placed) if self.keeps_ema else {}
        return TrainState(step, placed, optimizer, ema)

    def describe(self, trainable: Parameters) -> TrainState:
        """What `init` would give, as shapes on their shardings: for those who only compile the step."""
        zero, ema = jax.ShapeDtypeStruct((), jnp.int32), trainable if self.keeps_ema else {}
        state = TrainState(zero, trainable, jax.eval_shape(self.optimizer.init, trainable), ema)  # type: ignore[arg-type]
        return describe(state, self.shardings)

    def __call__(
        self,
        state: TrainState,
        frozen: nnx.State,
        base: Parameters | None,
        batch: Batch,
        tokens: float | None = None,
        taken: int | None = None,
    ) -> tuple[TrainState, dict[str, Float[Array, ""]], Float[Array, " b"]]:
        """(next state, metrics, loss per row). `state` is donated: do not touch it afterwards.

        `tokens` is what NLL sums of the whole batch are divided by; None: its answer tokens (see `LossContext`).
        `taken` is how many steps the caller has dispatched before this one: where the state has fewer behind it,
        one of them was not finite, and this step keeps the state as well, so that the caller may look at a step's
        numbers after it has dispatched the next. None: the state is taken as it comes.
        Where the loss or a gradient is not finite, the next state is the one given: nothing is poisoned.
        """
        with use_mesh(self.mesh):
            return self.jitted(
                state,
                frozen,
                base,
                batch,
                None if tokens is None else np.float32(tokens),
                None if taken is None else np.int32(taken),
            )

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
        compute_reference: Run the reference model too: the frozen leaves and the `base` leaves given to each
            call, see `reference_model`.
    """
    shapes = tuple(trainable[name].shape for name in partition.names)
    return _make_step(
        partition,
        shapes,
        check_objective(config),
        OptimizerSettings.of(config),
        groups=config.gradient_accumulation_steps,
        decay=config.ema_decay,
        total_steps=total_steps,
        mesh=mesh,
        remat=remat,
        compute_reference=compute_reference,
    )


@functools.lru_cache(maxsize=8)
def _make_step(
    partition: Partition,
    shapes: tuple[tuple[int, ...], ...],
    objective: Objective,
    settings: OptimizerSettings,
    *,
    groups: int,
    decay: float,
    total_steps: int,
    mesh: Mesh,
    remat: str,
    compute_reference: bool,
) -> TrainStep:
    optimizer = make_optimizer(settings, total_steps, partition.axes_by_name)
    schedule = learning_rate_schedule(settings, total_steps)

    def loss_of(
        trainable: Parameters, frozen: nnx.State, base: Parameters | None, batch: Batch, tokens: Any
    ) -> tuple[jax.Array, LossOutput]:
        model = partition.merge(trainable, frozen)
        reference = reference_model(partition, trainable, frozen, base) if compute_reference else None
        out = objective.loss(model, batch, LossContext(tokens, reference, remat))
        return out.loss, out

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

    def gradients(
        trainable: Parameters, frozen: nnx.State, base: Parameters | None, batch: Batch, tokens: Any
    ) -> tuple[LossOutput, Parameters]:
        if tokens is None:
            tokens = objective.answer_tokens(batch)
        if groups == 1:
            (_, out), grads = value_and_grad(trainable, frozen, base, batch, tokens)
            return out, grads
        tokens = None if tokens is None else tokens / groups
        rows, complete = micro_batches(batch, groups, objective.shared_fields)

        def accumulate(total: Parameters, group: Any) -> tuple[Parameters, LossOutput]:
            (_, out), grads = value_and_grad(trainable, frozen, base, complete(group), tokens)
            return jax.tree.map(jnp.add, total, grads), out

        total, outs = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, trainable), rows)
        mean = lambda x: jnp.mean(x, axis=0)  # noqa: E731
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), outs.token_sums)
        out = LossOutput(mean(outs.loss), jax.tree.map(mean, outs.metrics), outs.row_losses.T.reshape(-1), sums)
        return out, jax.tree.map(lambda x: x / groups, total)

    def step(
        state: TrainState,
        frozen: nnx.State,
        base: Parameters | None,
        batch: Batch,
        tokens: Any = None,
        taken: Any = None,
    ) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
        out, grads = gradients(state.trainable, frozen, base, batch, tokens)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, trainable) if decay else {}
        grad_norm = optax.tree.norm(grads)
        metrics = {
            "loss": out.loss,
            **out.metrics,
            **{name: total / jnp.maximum(count, 1) for name, (total, count) in out.token_sums.items()},
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
        }
        finite = jnp.isfinite(out.loss) & jnp.isfinite(grad_norm)
        if taken is not None:
            finite &= state.step == taken
        updated = TrainState(state.step + 1, trainable, optimizer_state, ema)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        return kept, metrics, out.row_losses

    shardings = _shardings(partition, shapes, optimizer, mesh, keeps_ema=decay > 0)
    whole = NamedSharding(mesh, P())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole, whole))
    return TrainStep(mesh, optimizer, shardings, jitted, keeps_ema=decay > 0)


def _shardings(
    partition: Partition,
    shapes: tuple[tuple[int, ...], ...],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    keeps_ema: bool,
) -> Any:
    """Shardings of a `TrainState`: moments and averages like their parameters, counters on every device."""
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
    leaves: tuple[Any, ...] = (whole, parameters, moments, parameters if keeps_ema else {})
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
