"""The training loop: a model and a batch source to a trained model, stoppable and resumable at any step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import TrainConfig
from m3po_jax.data.batches import BatchSource
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.sharding import shard_batch, to_host
from m3po_jax.training.checkpoint import Checkpointer, restore_trainable, write_json
from m3po_jax.training.harm import make_harm_metrics
from m3po_jax.training.losses import check_objective, starts_at_ln2
from m3po_jax.training.metrics_log import MetricsLog
from m3po_jax.training.progress import progress_bar
from m3po_jax.training.rollouts import RolloutIterator, RolloutSource
from m3po_jax.training.step import make_step, place_frozen, place_trainable, split_model

Source = BatchSource | RolloutSource

# Settings that may change between a run and its continuation.
_FREE_SETTINGS = ("save_steps", "keep_checkpoints", "log_steps", "harm_metrics_steps")


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


class StopSignal:
    """Set by SIGTERM or SIGINT; on several hosts, all of them stop at the same step."""

    def __init__(self) -> None:
        self.received: str | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def any_host(self) -> bool:
        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.received is not None)).any())


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catches SIGTERM and SIGINT while the block runs (in the main thread; elsewhere nothing is caught)."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    model: nnx.Module,
    batches: Source,
    config: TrainConfig,
    *,
    output_dir: str | Path,
    mesh: Mesh,
    seed: int = 0,
    remat: str = "none",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Trains `model` on `batches`, or continues where an earlier call with the same arguments stopped.

    In preference training the reference is `model` as given, adapters switched off (``reference: computed``),
    or what the generator recorded; rows without a record are computed. So a continuation must be given the
    same model.

    Args:
        model: Adapters attached where `config.lora` wants them. It is left as it is.
        batches: Endless batches of `config.batch_size` rows. Rollouts are made from the weights of the moment.
        output_dir: Gets ``checkpoints/``, ``metrics.jsonl`` and, at the end, ``done.json``. A finished stage
            is not run again: its last checkpoint is loaded.
        on_step: Called after each step with its number and metrics.

    Raises:
        UserError: settings or data that cannot be trained on; a loss or gradient that is not finite (the rows
            are named, the last checkpoint stays); reference log-probs that are not this model's.
        Interrupted: SIGTERM or SIGINT arrived; everything is saved.
    """
    output = Path(output_dir)
    check_objective(config)
    _check_steps(config, batches)
    total = batches.steps(config.epochs) if config.max_steps is None else config.max_steps
    partition, start, frozen = split_model(model, config)
    adapters_off = all(not np.any(to_host(value)) for name, value in start.items() if name.endswith("lora_b"))
    compute_reference = config.objective == "preference" and (
        config.reference == "computed" or not batches.has_reference
    )
    step_fn = make_step(
        partition,
        start,
        _without_free_settings(config),
        total_steps=total,
        mesh=mesh,
        remat=remat,
        compute_reference=compute_reference,
    )
    frozen = place_frozen(frozen, mesh)
    base = None
    if compute_reference:
        base = jax.tree.map(
            jnp.copy,
            jax.device_put(partition.base_weights(start), partition.base_weights(step_fn.shardings.trainable)),
        )
    state = step_fn.init(start)
    harm_steps = config.harm_metrics_steps if config.objective == "preference" else 0
    harm_metrics = make_harm_metrics(partition, config, mesh)
    compiled_before = step_fn.compilations
    first = jax.process_index() == 0
    output.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(output / "metrics.jsonl", enabled=first)
    fingerprint = _fingerprint(
        config=dataclasses.asdict(_without_free_settings(config)),
        data=batches.fingerprint,
        parameters={name: state.trainable[name].shape for name in partition.names},
        total=total,
        seed=seed,
    )
    guards = _Guards(config, batches, str(output), adapters_off, _ln2_tolerance(model))
    iterator = iter(batches)
    rollouts = iterator if isinstance(iterator, RolloutIterator) else None
    if rollouts is not None:
        rollouts.follow(lambda: partition.merge(state.trainable, frozen))
    last: dict[str, float] = {}
    with Checkpointer(output / "checkpoints", keep=config.keep_checkpoints, fingerprint=fingerprint) as saved:
        restored = saved.restore(state)
        if restored is not None:
            state, position = restored
            iterator.set_state(position)
        done = int(to_host(state.step))
        marker = _read_marker(output / "done.json")
        if marker is not None and done == total:
            trained = partition.merge(state.trainable, frozen)
            return TrainResult(trained, total, log.path, marker["metrics"], 0)
        log.truncate(done)
        started, first_step = time.monotonic(), done
        with stop_signal() as stop, progress_bar(total, done, enabled=first) as bar:
            while done < total:
                batch = next(iterator)
                placed = shard_batch(batch, mesh)
                measures = harm_steps > 0 and (done + 1) % harm_steps == 0
                harm = harm_metrics(state.trainable, frozen, base, placed) if measures else {}
                state, metrics, row_losses = step_fn(state, frozen, base, placed)
                last = {name: float(to_host(value)) for name, value in {**metrics, **harm}.items()}
                if rollouts is not None:
                    last |= rollouts.metrics
                guards.check(done, last, to_host(row_losses), batch.row_index, saved.latest_step)
                done += 1
                if done % config.log_steps == 0 or measures or done == total:
                    log.write(done, {"epoch": done * batches.batch_size / len(batches.ids), **last})
                bar(done, last)
                stopping = done < total and stop.any_host()
                if done % config.save_steps == 0 or done == total or stopping:
                    saved.save(done, state, iterator.get_state())
                if on_step is not None:
                    on_step(done, last)
                if stopping:
                    saved.wait()
                    raise Interrupted(
                        f"stopped by {stop.received or 'another host'} after step {done} of {total}; all is saved"
                    )
        saved.wait()
    if first:
        seconds = time.monotonic() - started
        content = {
            "steps": total,
            "metrics": last,
            "seconds": seconds,
            "steps_in_this_process": total - first_step,
        }
        write_json(output / "done.json", content)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("trained")  # the others look for the marker too
    trained = partition.merge(state.trainable, frozen)
    return TrainResult(trained, total, log.path, last, step_fn.compilations - compiled_before)


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
    partition, start, frozen = split_model(model, config)
    target = place_trainable(partition, start, mesh)
    trained = restore_trainable(output / "checkpoints", target)
    merged = partition.merge(trained, place_frozen(frozen, mesh))
    return TrainResult(merged, marker["steps"], output / "metrics.jsonl", marker["metrics"], 0)


class _Guards:
    """Checks that end a run before it wastes hours; see `check`."""

    def __init__(
        self,
        config: TrainConfig,
        batches: Source,
        where: str,
        adapters_off: bool,
        tolerance: float,
    ):
        self.batches, self.where, self.tolerance = batches, where, tolerance
        self.on_policy = isinstance(batches, RolloutSource)
        self.expects_ln2 = starts_at_ln2(config) and adapters_off

    def check(
        self,
        step: int,
        metrics: dict[str, float],
        row_losses: np.ndarray,
        rows: np.ndarray,
        saved: int | None,
    ) -> None:
        """Raises UserError for what must not happen at `step` (0: the first)."""
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            guilty = rows[~np.isfinite(row_losses)] if not np.isfinite(row_losses).all() else rows
            what = "loss" if not math.isfinite(metrics["loss"]) else "gradient"
            kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was made yet"
            names = ", ".join(repr(name) for name in self.batches.row_ids(np.unique(guilty)))
            raise UserError(
                f"the {what} is not finite at step {step + 1}, rows {names}",
                where=self.where,
                remedy=f"{kept}; drop the rows or lower train.learning_rate",
            )
        if step > 0 or self.on_policy:
            return  # equal rewards of all answers give no gradient, and the next rollout may
        if metrics["grad_norm"] == 0.0:
            raise UserError(
                "the gradient of the first step is zero: nothing would be learned",
                where=self.where,
                remedy="look at the pairs and at train.lora",
            )
        if self.expects_ln2 and abs(metrics["loss/preference"] - math.log(2)) > self.tolerance:
            raise UserError(
                f"the first preference loss is {metrics['loss/preference']:.6f}, not ln 2 = 0.693147: the "
                "reference log-probs do not belong to this model",
                where=self.where,
                remedy="set train.reference=computed, or make the candidates with this model",
            )


def _ln2_tolerance(model: Any) -> float:
    """Rounding of summed log-probs between the generator's pass and this one; coarse below float32."""
    return 1e-3 if getattr(getattr(model, "decoder", None), "dtype", None) == jnp.float32 else 5e-2


def _check_steps(config: TrainConfig, batches: Source) -> None:
    for name in ("save_steps", "log_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be positive, not {getattr(config, name)}", where=f"train.{name}")
    if config.max_steps is not None and config.max_steps < 1:
        raise UserError(f"max_steps must be positive, not {config.max_steps}", where="train.max_steps")
    if config.max_steps is None and not config.epochs > 0:
        raise UserError(f"epochs must be positive, not {config.epochs}", where="train.epochs")
    if batches.batch_size != config.batch_size:
        raise ValueError(f"batches of {batches.batch_size} rows for train.batch_size {config.batch_size}")


def _without_free_settings(config: TrainConfig) -> TrainConfig:
    default = TrainConfig()
    return dataclasses.replace(config, **{name: getattr(default, name) for name in _FREE_SETTINGS})


def _fingerprint(**content: Any) -> str:
    """A hash of everything that decides what a continuation computes, the frozen weights excepted."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_marker(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
