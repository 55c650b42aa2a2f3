"""The training loop: a model and a batch source to a trained model, stoppable and resumable at any step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.lengths import padding_share
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.hosts.agreement import barrier, first_failure, is_writer
from m3po_jax.hosts.sharding import to_host
from m3po_jax.hosts.signals import stop_signal
from m3po_jax.training import guards as checks
from m3po_jax.training.checkpoint import Checkpointer, TrainingProgress, best_step, restore_trainable
from m3po_jax.training.journal import Journal
from m3po_jax.training.progress import Advance, describe, progress_bar
from m3po_jax.training.reference import check_sample
from m3po_jax.training.stage import Stage, StepOutput, prepare, without_free_settings
from m3po_jax.training.step import TrainState, place_frozen, place_trainable, split_model
from m3po_jax.training.timing import StepTimer, batch_flops, batch_tokens
from m3po_jax.training.trackers import Trackers
from m3po_jax.workspace.training import TrainingArtifact


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


@dataclass
class _Position:
    """How far a stage has come: `progress` is the position of the data, `last` the last step's metrics."""

    state: TrainState
    progress: TrainingProgress
    done: int
    last: dict[str, float] = field(default_factory=dict)


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
    made_from: Mapping[str, Any] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Trains `model` on `batches`, or continues where an earlier call with the same arguments stopped.

    A continuation must be given the same models; `made_from` is how it knows.

    Args:
        model: Adapters attached where `config.lora` wants them. It is left as it is.
        batches: Endless batches of `config.batch_size` rows; or a `RolloutSource`, which makes them from the
            weights of the moment.
        output_dir: Gets ``checkpoints/``, ``metrics.jsonl``, ``timing.jsonl``, ``warnings.jsonl`` where there are
            any, and, at the end, ``done.json``. A finished stage is not run again: its checkpoint is loaded.
        reference: The reference model of preference training, of the structure of `model`; default: `model` as
            given. Log-probs that the batches bring along are its own (``reference: recorded``); the others are
            computed in the step.
        made_from: What the training depends on beside `batches` and `config`, by name (JSON values): above all a
            hash of the starting weights. Checkpoints that were made from something else are refused.
        on_step: Called with each step's number and metrics, when these are read: the next step may be under way.

    Raises:
        UserError: settings or data that cannot be trained on; a loss or gradient that is not finite (the rows
            are named, the state before is saved); reference log-probs that are not the reference model's.
        Interrupted: SIGTERM or SIGINT arrived; everything is saved.
    """
    output, artifact = Path(output_dir), TrainingArtifact(Path(output_dir))
    stage, start = prepare(model, batches, config, output, mesh, remat=remat, reference=reference)
    compiled_before = stage.step.compilations
    fingerprint = _fingerprint(
        config=dataclasses.asdict(without_free_settings(config)),
        data=batches.fingerprint,
        parameters={name: start[name].shape for name in stage.partition.names},
        total=stage.total,
        seed=seed,
        **({} if made_from is None else {"made_from": dict(made_from)}),
    )
    output.mkdir(parents=True, exist_ok=True)
    journal = Journal(output, config, enabled=is_writer())
    with Checkpointer(
        artifact.checkpoints,
        keep=config.keep_checkpoints,
        fingerprint=fingerprint,
        keep_best=config.keep_best,
        metric=config.best_metric,
    ) as saved:
        at = _restored(stage, saved, stage.step.init(start))
        marker = artifact.marker()
        if marker is not None and at.done == stage.total:
            return _result(model, config, output, mesh, stage.total, marker["metrics"], 0)
        journal.continue_from(at.done)
        if at.done == stage.total:  # stopped between the last checkpoint and the mark
            at.last = journal.last()
        if stage.agrees is not None and not stage.objective.computes_reference and at.done == 0:
            _check_recorded(stage, reference if reference is not None else model)
        started, first_step = time.monotonic(), at.done
        name = f"{output.parent.name}-{output.name}-{fingerprint[:8]}"
        _run_steps(stage, at, saved, journal, name=name, on_step=on_step)
        saved.wait()
    _mark_done(stage, at.last, seconds=time.monotonic() - started, steps=stage.total - first_step)
    compilations = stage.step.compilations - compiled_before
    if config.weights == "best":
        return _result(model, config, output, mesh, stage.total, at.last, compilations)
    learned = at.state.ema if config.weights == "ema" else at.state.trainable
    return TrainResult(stage.partition.merge(learned, stage.frozen), stage.total, journal.path, at.last, compilations)


def _restored(stage: Stage, saved: Checkpointer, state: TrainState) -> _Position:
    """The position of the last checkpoint, the data's included; without one that of `state`, the first."""
    restored = saved.restore(state)
    if restored is None:
        progress = TrainingProgress(stage.batches_taken.get_state())
    else:
        state, progress = restored
        stage.batches_taken.set_state(progress.iterator)
    return _Position(state, progress, int(to_host(state.step)))


def _check_recorded(stage: Stage, reference: nnx.Module) -> None:
    """Recorded log-probs of some rows against those of the reference model.

    Raises:
        UserError: they are not its own.
    """
    rows = stage.config.reference_check_rows
    if rows and stage.batches.take is not None:
        check_sample(reference, stage.batches, stage.mesh, rows, checks.token_tolerance(reference))


def _run_steps(
    stage: Stage,
    at: _Position,
    saved: Checkpointer,
    journal: Journal,
    *,
    name: str,
    on_step: Callable[[int, dict[str, float]], None] | None,
) -> None:
    """Takes the steps that are left, and moves `at` along; `name` is what trackers call the stage.

    Raises:
        UserError, Interrupted: as `train`.
    """
    config, first = stage.config, is_writer()
    if stage.rollouts is not None:
        stage.rollouts.follow(lambda: stage.partition.merge(at.state.trainable, stage.frozen))
    with (
        Trackers(
            config.report_to,
            stage.output,
            name=name,
            settings=dataclasses.asdict(config),
            done=at.done,
            first=first,
        ) as trackers,
        stop_signal() as stop,
        progress_bar("training", stage.total, at.done, enabled=first) as bar,
    ):
        run = _Steps(stage, at, saved, journal, trackers, bar, on_step)
        while run.dispatched < stage.total:
            run.take()
            last_step = run.dispatched == stage.total
            stopping = not last_step and stop.any_host()
            scheduled = run.dispatched % config.save_steps == 0 or last_step
            if scheduled or stopping:
                run.read()
                _save(stage, at, saved, journal.value_of(at.done) if scheduled and config.keep_best else None)
            if stopping:
                saved.wait()
                signal = stop.received or "another host"
                raise Interrupted(f"stopped by {signal} after step {at.done} of {stage.total}; all is saved")


@dataclass(frozen=True)
class _UnderWay:
    """A step that was dispatched and whose numbers are not read yet.

    Attributes:
        after: The position of the data behind its batch.
    """

    number: int
    batch: Any
    output: StepOutput
    after: TrainingProgress
    tokens: int
    compiled: bool


class _Steps:
    """Takes the steps of a stage, each dispatched before the numbers of the one before it are read.

    The devices then always have work: a step's numbers are fetched in one transfer while the next step computes.
    `at` holds the newest state; its other fields speak of the last step whose numbers were read. The two agree
    after `read`.
    """

    def __init__(
        self,
        stage: Stage,
        at: _Position,
        saved: Checkpointer,
        journal: Journal,
        trackers: Trackers,
        bar: Advance,
        on_step: Callable[[int, dict[str, float]], None] | None,
    ):
        self.stage, self.at, self.saved, self.journal = stage, at, saved, journal
        self.trackers, self.bar, self.on_step = trackers, bar, on_step
        self.timer, self.dispatched = StepTimer(stage.mesh), at.done
        self._under_way: _UnderWay | None = None

    def take(self) -> None:
        """Dispatches the next step, and reads the numbers of the one before.

        Raises:
            UserError: as `read`.
        """
        stage, compiled = self.stage, self.stage.step.compilations
        batch = stage.next_batch()
        number, tokens = self.dispatched + 1, batch_tokens(batch)
        self.at.state, output = stage.dispatch(self.at.state, batch, number)
        before = self.at.progress if self._under_way is None else self._under_way.after
        after = TrainingProgress(stage.batches_taken.get_state(), before.num_tokens + tokens)
        fresh = stage.step.compilations > compiled
        step = _UnderWay(number, batch, output, after, tokens, fresh)
        self.read()
        self._under_way, self.dispatched = step, number
        # The first step tells whether the stage is sound at all.
        if number == 1 or not stage.reads_late:
            self.read()

    def read(self) -> None:
        """Reads the numbers of the step that is under way, if any, and writes them down.

        Raises:
            UserError: they are not finite, or not what the first step's must be. The state before them is saved.
        """
        if self._under_way is None:
            return
        step, self._under_way = self._under_way, None
        stage, at, config = self.stage, self.at, self.stage.config
        numbers, broken = stage.read(step.output, step.batch, step.number)
        if broken is not None:
            raise _rescued(stage, at, self.saved, broken, step.batch.row_index)
        at.progress = step.after
        at.last = {
            **numbers,
            "num_tokens": float(at.progress.num_tokens),
            "padding": padding_share(step.batch),
        }
        if step.number == 1:
            _check_first_step(stage, at, self.journal)
        at.done = step.number
        last_step = at.done == stage.total
        logged = {"epoch": at.done * stage.batches.batch_size / len(stage.batches.ids), **at.last}
        due = at.done % config.log_steps == 0 or last_step
        if due or stage.measures(at.done):
            self.journal.metrics(at.done, logged)
        flops = batch_flops(stage.cost, step.batch, reference=stage.base is not None)
        rows = stage.batches.batch_size
        took = self.timer.lap(rows=rows, tokens=step.tokens, flops=flops, compiled=step.compiled)
        if due:
            self.journal.timing(at.done, took)
            self.trackers.log(at.done, {**logged, **took})
        self.bar(at.done, describe(at.last))
        if self.on_step is not None:
            self.on_step(at.done, at.last)


def _save(stage: Stage, at: _Position, saved: Checkpointer, value: float | None = None) -> None:
    """A checkpoint of the position, with the rollout that it is in the midst of."""
    if stage.rollouts is not None:
        stage.rollouts.keep()
    saved.save(at.done, at.state, at.progress, value=value)


def _rescued(stage: Stage, at: _Position, saved: Checkpointer, broken: str, rows: Sequence[int]) -> UserError:
    """The error of a step that is not finite, once the state before it is on disk.

    The step has kept its state, a step that was dispatched behind it likewise, and `at.progress` is still the
    position before this batch.
    """
    _save(stage, at, saved)
    saved.wait()
    return unreadable(stage.batches.failures, rows) or UserError(
        broken,
        where=str(stage.output),
        remedy=f"the checkpoint of step {at.done} is from before, and the same command goes on from it "
        "once what these rows hold is mended; without them, or with a lower train.learning_rate, it "
        "is another training: give it another name=..., or remove its folder to start it anew",
    )


def _check_first_step(stage: Stage, at: _Position, journal: Journal) -> None:
    """What is known of the first step; answers without an end and leaves that learn nothing are told of."""
    if cut := stage.batches.cut_answers:
        journal.warn(
            1,
            "cut",
            f"{cut} of {len(stage.batches.ids)} answers to learn from have no end token (cut at "
            "generate.max_new_tokens, or at a stop string): they teach the model not to stop; raise the limit, or "
            "leave them out (select.cut=drop)",
        )
    if not stage.objective.needs_first_gradient:
        return
    idle = checks.idle_leaves(at.state.optimizer, stage.partition.adapters_by_name)
    stage.guards.first_step(at.last, idle)
    if idle:
        names = ", ".join(idle)
        journal.warn(1, "idle", f"no gradient reaches {names}: these parameters are trained in name only")


def _mark_done(stage: Stage, last: dict[str, float], *, seconds: float, steps: int) -> None:
    """Writes ``done.json``; no host goes on before it is there."""
    if is_writer():
        artifact = TrainingArtifact(stage.output)
        content = {
            "steps": stage.total,
            "metrics": {name: value if math.isfinite(value) else None for name, value in last.items()},
            "seconds": seconds,
            "steps_in_this_process": steps,
        }
        if stage.config.keep_best:
            content["best_step"] = best_step(artifact.checkpoints, stage.config.best_metric)
        artifact.mark(content)
    barrier("trained")  # the others look for the marker too


def load_trained(model: nnx.Module, config: TrainConfig, *, output_dir: str | Path, mesh: Mesh) -> TrainResult:
    """What a finished `train` returned, without its data.

    Args:
        model: As `train` was given it.

    Raises:
        UserError: the stage is not finished, or was trained with other settings.
    """
    output = Path(output_dir)
    marker = TrainingArtifact(output).marker()
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
    artifact = TrainingArtifact(output)
    trained = restore_trainable(
        artifact.checkpoints,
        place_trainable(partition, start, mesh),
        weights=config.weights,
        metric=config.best_metric,
    )
    merged = partition.merge(trained, place_frozen(frozen, mesh))
    return TrainResult(merged, steps, artifact.metrics_path, metrics, compilations)


def _fingerprint(**content: Any) -> str:
    """A hash of everything that decides what a continuation computes, the frozen weights excepted."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def unreadable(failures: Mapping[int, UserError], rows: Sequence[int]) -> UserError | None:
    """Why a row of a batch could not be read by the host that needs it; the same on all hosts, which all ask."""
    here = next(((place, failures[row]) for place, row in enumerate(map(int, rows)) if row in failures), None)
    first = first_failure(here)
    return None if first is None else first[1]
