"""The training loop: a model and a batch source to a trained model, stoppable and resumable at any step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
from m3po_jax.data.lengths import padding_share
from m3po_jax.data.tables import write_json
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.hosts import first_failure
from m3po_jax.sharding import shard_batch, to_host
from m3po_jax.training import guards as checks
from m3po_jax.training.checkpoint import Checkpointer, Progress, best_step, restore_trainable
from m3po_jax.training.flops import step_cost
from m3po_jax.training.harm import make_harm_metrics
from m3po_jax.training.losses import needs_reference_pass
from m3po_jax.training.metrics_log import MetricsLog, Trackers
from m3po_jax.training.objectives import check_objective
from m3po_jax.training.progress import progress_bar
from m3po_jax.training.reference import check_sample
from m3po_jax.training.rollouts import RolloutIterator
from m3po_jax.training.signals import stop_signal
from m3po_jax.training.step import Parameters, Partition, make_step, place_frozen, place_trainable, split_model
from m3po_jax.training.timing import StepTimer, batch_flops, batch_tokens

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

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves behind.

    Attributes:
        model: The trained model; its frozen leaves are shared with the model that was given.
        steps: Optimizer steps of the whole stage.
        metrics_path: `metrics.jsonl`.
        metrics: The last step's metrics.
        compilations: Batch shapes compiled in this process (0: the stage was already finished).
    """

    model: Any
    steps: int
    metrics_path: Path
    metrics: dict[str, float]
    compilations: int


@dataclass(frozen=True)
class _Reference:
    """The model that the policy is compared with.

    Attributes:
        base: Its leaves that training would change, for `step.reference_model`; None: it does not run.
        agrees: It computes what the starting policy computes.
    """

    base: Parameters | None
    agrees: bool


def train(
    model: nnx.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    output_dir: str | Path,
    mesh: Mesh,
    seed: int = 0,
    remat: str = "none",
    reference: nnx.Module | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Trains `model` on `batches`, or continues where an earlier call with the same arguments stopped.

    A continuation must be given the same models.

    Args:
        model: Adapters attached where `config.lora` wants them. It is left as it is.
        batches: Endless batches of `config.batch_size` rows; or a `RolloutSource`, which makes them from the
            weights of the moment.
        output_dir: Gets ``checkpoints/``, ``metrics.jsonl``, ``timing.jsonl``, ``warnings.jsonl`` where there are
            any, and, at the end, ``done.json``. A finished stage is not run again: its checkpoint is loaded.
        reference: The reference model of preference training, of the structure of `model`; default: `model` as
            given. Log-probs that the batches bring along are its own (``reference: recorded``); the others are
            computed in the step.
        on_step: Called after each step with its number and metrics.

    Raises:
        UserError: settings or data that cannot be trained on; a loss or gradient that is not finite (the rows
            are named, the state before is saved); reference log-probs that are not the reference model's.
        Interrupted: SIGTERM or SIGINT arrived; everything is saved.
    """
    output = Path(output_dir)
    objective = check_objective(config)
    checks.check_settings(config, batches)
    total = batches.steps(config.epochs) if config.max_steps is None else config.max_steps
    partition, start, frozen = split_model(model, config)
    compares = _reference(partition, start, config, batches, reference) if objective.uses_reference else None
    base = None if compares is None else compares.base
    step_fn = make_step(
        partition,
        start,
        without_free_settings(config),
        total_steps=total,
        mesh=mesh,
        remat=remat,
        compute_reference=base is not None,
    )
    frozen = place_frozen(frozen, mesh)
    if base is not None:
        # A copy: the state is donated, and on one device it would be the same buffers.
        placed = {name: jax.device_put(value, step_fn.shardings.trainable[name]) for name, value in base.items()}
        base = jax.tree.map(jnp.copy, placed)
    cost = step_cost(model, set(start))
    per_row = batches.answer_tokens if config.token_mean == "data" else None
    per_batch = None if per_row is None else per_row * batches.batch_size
    state = step_fn.init(start)
    harm_steps = config.harm_metrics_steps if objective.uses_reference else 0
    harm_metrics = make_harm_metrics(partition, config, mesh)
    compiled_before = step_fn.compilations
    first = jax.process_index() == 0
    output.mkdir(parents=True, exist_ok=True)
    logs = [MetricsLog(output / f"{name}.jsonl", enabled=first) for name in ("metrics", "warnings", "timing")]
    log, warnings, timing = logs
    fingerprint = _fingerprint(
        config=dataclasses.asdict(without_free_settings(config)),
        data=batches.fingerprint,
        parameters={name: state.trainable[name].shape for name in partition.names},
        total=total,
        seed=seed,
    )
    guards = checks.Guards(
        config,
        batches,
        str(output),
        agrees=compares is None or compares.agrees,
        tolerance=checks.sum_tolerance(model),
    )
    images = _image_tokens(model)
    iterator = iter(batches)
    rollouts = iterator if isinstance(iterator, RolloutIterator) else None
    if rollouts is not None:
        rollouts.follow(lambda: partition.merge(state.trainable, frozen))
    last: dict[str, float] = {}
    with Checkpointer(
        output / "checkpoints",
        keep=config.keep_checkpoints,
        fingerprint=fingerprint,
        keep_best=config.keep_best,
        metric=config.best_metric,
    ) as saved:
        restored = saved.restore(state)
        progress = Progress(iterator.get_state()) if restored is None else restored[1]
        if restored is not None:
            state = restored[0]
            iterator.set_state(progress.iterator)
        done = int(to_host(state.step))
        marker = _read_marker(output / "done.json")
        if marker is not None and done == total:
            return _result(model, config, output, mesh, total, marker["metrics"], 0)
        for file in logs:
            file.truncate(done)
        history = log.lines(done)
        warned = any(line["kind"] == "collapse" for line in warnings.lines(done))
        watch = checks.CollapseWatch(config.collapse_warning, history, warned=warned)

        def warn(step: int, kind: str, message: str) -> None:
            warnings.write(step, {"kind": kind, "message": message})
            if first:
                _logger.warning("step %d: %s", step, message)

        checks_reference = compares is not None and config.reference == "recorded" and done == 0
        if checks_reference and config.reference_check_rows and batches.take is not None:
            frozen_reference = reference if reference is not None else model
            check_sample(frozen_reference, batches, mesh, config.reference_check_rows, checks.token_tolerance(model))
        started, first_step = time.monotonic(), done
        with (
            Trackers(
                config.report_to,
                output,
                name=f"{output.parent.name}-{output.name}-{fingerprint[:8]}",
                settings=dataclasses.asdict(config),
                done=done,
                first=first,
            ) as trackers,
            stop_signal() as stop,
            progress_bar(total, done, enabled=first) as bar,
        ):
            timer = StepTimer(mesh)
            while done < total:
                batch, compiled = next(iterator), step_fn.compilations
                if images is not None and hasattr(batch, "prefix_ids"):
                    checks.check_image_tokens(batch, batches.ids, *images)
                placed = shard_batch(batch, mesh)
                measures = harm_steps > 0 and (done + 1) % harm_steps == 0
                harm = harm_metrics(state.trainable, frozen, base, placed) if measures else {}
                state, metrics, row_losses = step_fn(state, frozen, base, placed, per_batch)
                tokens = batch_tokens(batch)
                numbers = {name: float(to_host(value)) for name, value in {**metrics, **harm}.items()}
                broken = guards.finite(done, numbers, to_host(row_losses), batch.row_index)
                if rollouts is not None:
                    numbers |= rollouts.metrics
                if broken is not None:
                    if rollouts is not None:
                        rollouts.keep()
                    # The step has kept its state, and `progress` is still the position before this batch.
                    saved.save(done, state, progress)
                    saved.wait()
                    raise unreadable(batches.failures, batch.row_index) or UserError(
                        broken,
                        where=str(output),
                        remedy=f"the checkpoint of step {done} is from before, and the same command goes on from it "
                        "once what these rows hold is mended; without them, or with a lower train.learning_rate, it "
                        "is another training: give it another name=..., or remove its folder to start it anew",
                    )
                progress = Progress(iterator.get_state(), progress.num_tokens + tokens)
                last = {**numbers, "num_tokens": float(progress.num_tokens), "padding": padding_share(batch)}
                if done == 0 and objective.needs_first_gradient:
                    idle = checks.idle_leaves(state.optimizer, partition.adapters_by_name)
                    guards.first_step(last, idle)
                    if idle:
                        names = ", ".join(idle)
                        warn(1, "idle", f"no gradient reaches {names}: these parameters are trained in name only")
                done += 1
                epoch = {"epoch": done * batches.batch_size / len(batches.ids)}
                if done % config.log_steps == 0 or measures or done == total:
                    history.append(log.write(done, {**epoch, **last}))
                    collapse = watch.see(history[-1])
                    if collapse is not None:
                        warn(done, "collapse", collapse)
                flops = batch_flops(cost, batch, images=images, reference=base is not None)
                took = timer.lap(
                    rows=batches.batch_size, tokens=tokens, flops=flops, compiled=step_fn.compilations > compiled
                )
                if done % config.log_steps == 0 or done == total:
                    timing.write(done, took)
                    trackers.log(done, {**epoch, **last, **took})
                bar(done, last)
                stopping = done < total and stop.any_host()
                scheduled = done % config.save_steps == 0 or done == total
                if scheduled or stopping:
                    if rollouts is not None:
                        rollouts.keep()
                    value = _since(history, done, config) if scheduled and config.keep_best else None
                    saved.save(done, state, progress, value=value)
                if on_step is not None:
                    on_step(done, last)
                if stopping:
                    saved.wait()
                    raise Interrupted(
                        f"stopped by {stop.received or 'another host'} after step {done} of {total}; all is saved"
                    )
        saved.wait()
    if first:
        content = {
            "steps": total,
            "metrics": {name: value if math.isfinite(value) else None for name, value in last.items()},
            "seconds": time.monotonic() - started,
            "steps_in_this_process": total - first_step,
        }
        if config.keep_best:
            content["best_step"] = best_step(output / "checkpoints", config.best_metric)
        write_json(output / "done.json", content)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("trained")  # the others look for the marker too
    compilations = step_fn.compilations - compiled_before
    if config.weights == "best":
        return _result(model, config, output, mesh, total, last, compilations)
    trained = partition.merge(state.ema if config.weights == "ema" else state.trainable, frozen)
    return TrainResult(trained, total, log.path, last, compilations)


def load_trained(model: nnx.Module, config: TrainConfig, *, output_dir: str | Path, mesh: Mesh) -> TrainResult:
    """What a finished `train` returned, without its data.

    Args:
        model: As `train` was given it.

    Raises:
        UserError: the stage is not finished, or was trained with other settings.
    """
    output = Path(output_dir)
    marker = _read_marker(output / "done.json")
    if marker is None:
        raise UserError("no finished training", where=str(output), remedy="run `m3po train` first")
    return _result(model, config, output, mesh, marker["steps"], marker["metrics"], 0)


def _result(
    model: nnx.Module,
    config: TrainConfig,
    output: Path,
    mesh: Mesh,
    steps: int,
    metrics: dict[str, float],
    compilations: int,
) -> TrainResult:
    """A stage's result from its checkpoints, with the weights that `config.weights` names."""
    partition, start, frozen = split_model(model, config)
    trained = restore_trainable(
        output / "checkpoints",
        place_trainable(partition, start, mesh),
        weights=config.weights,
        metric=config.best_metric,
    )
    merged = partition.merge(trained, place_frozen(frozen, mesh))
    return TrainResult(merged, steps, output / "metrics.jsonl", metrics, compilations)


def _reference(
    partition: Partition,
    start: Parameters,
    config: TrainConfig,
    batches: BatchSource,
    given: nnx.Module | None,
) -> _Reference:
    """The reference's own leaves, where it must run, and whether it is the starting policy."""
    leaves = start if given is None else split_model(given, config)[1]
    factors = [name for name, adapter in partition.adapters_by_name.items() if adapter and name.endswith("lora_b")]
    active = any(np.any(to_host(leaves[name])) for name in factors)
    agrees = given is None or all(np.array_equal(to_host(leaves[name]), to_host(start[name])) for name in start)
    computed = config.reference == "computed" or not batches.has_reference
    # What no record holds is computed by the policy without adapters, which is not the reference of every round.
    computed = computed or (needs_reference_pass(config) and (active or not agrees))
    if not computed:
        return _Reference(None, agrees)
    # Adapters that do nothing are switched off rather than computed.
    return _Reference(dict(leaves) if active else partition.base_weights(leaves), agrees)


def _image_tokens(model: Any) -> tuple[int, int] | None:
    """(image token id, tokens per image) of a vision-language model."""
    settings = getattr(model, "config", None)
    found = getattr(settings, "image_token_id", None), getattr(settings, "tokens_per_image", None)
    return None if found[0] is None or found[1] is None else (int(found[0]), int(found[1]))


def _since(history: Sequence[Mapping[str, Any]], done: int, config: TrainConfig) -> float:
    """Mean of `best_metric` over the lines logged since the scheduled checkpoint before.

    Raises:
        UserError: the metric is not logged.
    """
    before = (done - 1) // config.save_steps * config.save_steps
    values = [line.get(config.best_metric) for line in history if line["step"] > before]
    known = [value for value in values if value is not None]
    if not known:
        names = ", ".join(sorted(history[-1])) if history else "nothing"
        raise UserError(
            f"{config.best_metric!r} is not logged", where="train.best_metric", remedy=f"there are {names}"
        )
    return float(np.mean(known))


def without_free_settings(config: TrainConfig) -> TrainConfig:
    """The settings that decide what is learned, the others at their defaults."""
    default = TrainConfig()
    return dataclasses.replace(config, **{name: getattr(default, name) for name in _FREE_SETTINGS})


def _fingerprint(**content: Any) -> str:
    """A hash of everything that decides what a continuation computes, the frozen weights excepted."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def unreadable(failures: Mapping[int, UserError], rows: Sequence[int]) -> UserError | None:
    """Why a row of a batch could not be read by the host that needs it; the same on all hosts, which all ask."""
    own = next(((place, failures[row]) for place, row in enumerate(map(int, rows)) if row in failures), None)
    found = first_failure(own)
    return None if found is None else found[1]


def _read_marker(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
