"""A training stage made ready: the model split and placed, the step compiled on its first use, what guards it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.hosts.sharding import shard_batch, to_host
from m3po_jax.models.image_family import ImageFamily
from m3po_jax.models.registry import family_of_model
from m3po_jax.objectives.objective import Objective
from m3po_jax.objectives.registry import check_objective
from m3po_jax.training import guards as checks
from m3po_jax.training.flops import StepCost, step_cost
from m3po_jax.training.harm import make_harm_metrics
from m3po_jax.training.rollouts import RolloutIterator
from m3po_jax.training.step import Parameters, Partition, TrainState, TrainStep, make_step, place_frozen, split_model

# Settings that may change between a run and its continuation.
_FREE_SETTINGS = (
    "save_steps",
    "keep_checkpoints",
    "keep_best",
    "best_metric",
    "weights",
    "log_steps",
    "report_to",
    "harm_metrics_steps",
    "collapse_warning",
    "reference_check_rows",
)


@dataclass(frozen=True)
class StepOutput:
    """What a step that was dispatched will have measured.

    Attributes:
        metrics: Scalars, and
        row_losses: the loss of each row; both on the devices, whole on each.
        rollout: Numbers of the rollout that the batch belongs to.
    """

    metrics: dict[str, jax.Array]
    row_losses: jax.Array
    rollout: dict[str, float]


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to run: what its steps need and none of them changes.

    Attributes:
        frozen: Leaves that do not learn, and
        base: those of the reference model, on their shardings.
        agrees: The reference computes what the starting policy computes; None: there is no reference.
        tokens: What NLL sums of a batch are divided by; None: its own answer tokens.
        cost: Of a token, where the model's is known.
        images: Of a model that reads images, and
        model_config: its configuration.
        batches_taken: The iterator over `batches`, at the position of the last step.
    """

    config: TrainConfig
    batches: BatchSource
    output: Path
    mesh: Mesh
    total: int
    objective: Objective
    partition: Partition
    step: TrainStep
    frozen: nnx.State
    base: Parameters | None
    agrees: bool | None
    tokens: float | None
    cost: StepCost | None
    images: ImageFamily | None
    model_config: Any
    harm_steps: int
    harm_metrics: Callable[..., dict[str, jax.Array]]
    guards: checks.Guards
    batches_taken: Any

    @property
    def rollouts(self) -> RolloutIterator | None:
        return self.batches_taken if isinstance(self.batches_taken, RolloutIterator) else None

    def measures(self, step: int) -> bool:
        """Whether step number `step` has the text-only accuracies too."""
        return self.harm_steps > 0 and step % self.harm_steps == 0

    def next_batch(self) -> Any:
        batch = next(self.batches_taken)
        if self.images is not None:
            checks.check_image_tokens(batch, self.batches.ids, self.images, self.model_config)
        return batch

    def dispatch(self, state: TrainState, batch: Any, step: int) -> tuple[TrainState, StepOutput]:
        """Step number `step` (from 1), under way on the devices: the next state, and what its numbers will be.

        Nothing is waited for. Where the step before was not finite, the state stays as that one had found it.
        """
        placed = shard_batch(batch, self.mesh)
        # First, because the step consumes the state.
        harm = self.harm_metrics(state.trainable, self.frozen, self.base, placed) if self.measures(step) else {}
        state, metrics, row_losses = self.step(
            state, self.frozen, self.base, placed, self.tokens, step - 1 if self.reads_late else None
        )
        numbers = {**metrics, **harm}
        for value in (*numbers.values(), row_losses):
            value.copy_to_host_async()
        return state, StepOutput(numbers, row_losses, self.rollouts.metrics if self.rollouts is not None else {})

    @property
    def reads_late(self) -> bool:
        """Whether a step's numbers are read when the next one is under way, so that the devices never wait.

        A rollout is made from the weights of the moment and must not be made from a step that is not finite.
        """
        return self.rollouts is None

    def read(self, output: StepOutput, batch: Any, step: int) -> tuple[dict[str, float], str | None]:
        """The metrics of step number `step`, in one transfer, and the error text where they are not finite."""
        scalars, row_losses = jax.device_get((output.metrics, output.row_losses))
        numbers = {name: float(value) for name, value in scalars.items()}
        broken = self.guards.finite(step - 1, numbers, row_losses, batch.row_index)
        return numbers | output.rollout, broken


def prepare(
    model: nnx.Module,
    batches: BatchSource,
    config: TrainConfig,
    output: Path,
    mesh: Mesh,
    *,
    remat: str,
    reference: nnx.Module | None,
) -> tuple[Stage, Parameters]:
    """The stage, with everything but the first state on the devices, and the leaves that learn."""
    objective = check_objective(config)
    checks.check_settings(config)
    if batches.batch_size != config.batch_size:
        raise ValueError(f"batches of {batches.batch_size} rows for train.batch_size {config.batch_size}")
    total = batches.steps(config.epochs) if config.max_steps is None else config.max_steps
    partition, start, frozen = split_model(model, config)
    compares = (
        _reference(partition, start, objective, config, batches, reference) if objective.uses_reference else None
    )
    base = None if compares is None else compares.base
    step = make_step(
        partition,
        start,
        without_free_settings(config),
        total_steps=total,
        mesh=mesh,
        remat=remat,
        compute_reference=base is not None,
    )
    if base is not None:
        # A copy: the state is donated, and on one device it would be the same buffers.
        placed = {name: jax.device_put(value, step.shardings.trainable[name]) for name, value in base.items()}
        base = jax.tree.map(jnp.copy, placed)
    per_row = batches.answer_tokens if config.token_mean == "data" else None
    guards = checks.Guards(
        objective,
        batches,
        str(output),
        agrees=compares is None or compares.agrees,
        tolerance=checks.sum_tolerance(model),
    )
    stage = Stage(
        config,
        batches,
        output,
        mesh,
        total,
        objective,
        partition,
        step,
        place_frozen(frozen, mesh),
        base,
        agrees=None if compares is None else compares.agrees,
        tokens=None if per_row is None else per_row * batches.batch_size,
        cost=step_cost(model, set(start)),
        images=family_of_model(model).images,
        model_config=model.config,  # type: ignore[attr-defined]
        harm_steps=config.harm_metrics_steps if objective.uses_reference else 0,
        harm_metrics=make_harm_metrics(partition, config.gradient_accumulation_steps, objective.shared_fields, mesh),
        guards=guards,
        batches_taken=iter(batches),
    )
    return stage, start


@dataclass(frozen=True)
class _Reference:
    """The model that the policy is compared with.

    Attributes:
        base: Its leaves that training would change, for `step.reference_model`; None: it does not run.
        agrees: It computes what the starting policy computes.
    """

    base: Parameters | None
    agrees: bool


def _reference(
    partition: Partition,
    start: Parameters,
    objective: Objective,
    config: TrainConfig,
    batches: BatchSource,
    given: nnx.Module | None,
) -> _Reference:
    """The reference's own leaves, where it must run, and whether it is the starting policy."""
    leaves = start if given is None else split_model(given, config)[1]
    factors = [name for name, adapter in partition.adapters_by_name.items() if adapter and name.endswith("lora_b")]
    active = any(np.any(to_host(leaves[name])) for name in factors)
    agrees = given is None or all(np.array_equal(to_host(leaves[name]), to_host(start[name])) for name in start)
    computed = objective.computes_reference or not batches.has_reference
    # What no record holds is computed by the policy without adapters, which is not the reference of every round.
    computed = computed or (objective.needs_reference_pass and (active or not agrees))
    if not computed:
        return _Reference(None, agrees)
    # Adapters that do nothing are switched off rather than computed.
    return _Reference(dict(leaves) if active else partition.base_weights(leaves), agrees)


def without_free_settings(config: TrainConfig) -> TrainConfig:
    """The settings that decide what is learned, the others at their defaults."""
    default = TrainConfig()
    return dataclasses.replace(config, **{name: getattr(default, name) for name in _FREE_SETTINGS})
