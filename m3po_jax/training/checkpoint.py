"""Checkpoints of a training stage: asynchronous, atomic, the last and the best kept, restorable onto any mesh.

A checkpoint holds the `TrainState`, the data position (a Grain iterator's JSON state), counters and a fingerprint of
data and settings. With it, in the same folder, appears `CHECKSUMS`, the SHA-256 of each of its files: one that is not
what was written is never restored, but set aside, and the one before it is taken. The only random numbers of training
are the order of rows, a function of the seed (in the fingerprint) and the position. Frozen weights are not in it:
with adapters, saving at every step is cheap.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from m3po_jax.config import TrainConfig
from m3po_jax.data.tables import write_json
from m3po_jax.errors import UserError, full_disk_told
from m3po_jax.hosts.agreement import agreed, barrier, is_writer
from m3po_jax.reading import check_value
from m3po_jax.training.step import Parameters, TrainState
from m3po_jax.workspace.checksums import checksums
from m3po_jax.workspace.layout import CHECKSUMS, SET_ASIDE
from m3po_jax.workspace.records import free_name

_logger = logging.getLogger(__name__)
# Orbax writes the latter two while the checkpoint appears.
UNSUMMED = frozenset({CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt"})


@dataclasses.dataclass(frozen=True)
class TrainingProgress:
    """What a checkpoint knows beside the arrays.

    Attributes:
        iterator: The data iterator's state.
        num_tokens: Tokens processed so far, as in the metrics.
    """

    iterator: dict[str, Any]
    num_tokens: int = 0


def is_minimised(metric: str) -> bool:
    """Losses and negative log-likelihoods are better when they are small, everything else when it is large."""
    return "loss" in metric or "nll" in metric


def _best_value(metrics: Any) -> float:
    return metrics["value"]


class Checkpointer:
    """A context manager around Orbax's; leaving it waits for what is being written.

    Args:
        keep: The last so many are kept,
        keep_best: and so many of those saved with the best `metric`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int,
        fingerprint: str,
        keep_best: int = 0,
        metric: str = "loss",
    ):
        check_value(TrainConfig, "keep_checkpoints", keep, "train")
        self.directory, self.fingerprint = epath.Path(os.fspath(directory)), fingerprint
        if "://" not in os.fspath(directory):
            self.directory = epath.Path(Path(directory).absolute())
        self._saving: int | None = None
        self._bytes = 0  # of a checkpoint, as far as it is known
        best = BestN(
            get_metric_fn=_best_value,
            reverse=is_minimised(metric),
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), *([best] if keep_best else [])]),
                best_fn=_best_value if keep_best else None,  # without it Orbax writes no metrics
                best_mode="min" if is_minimised(metric) else "max",
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._sum),
            ),
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with full_disk_told(os.fspath(self.directory), self._bytes):
            self._manager.close()

    def _sum(self) -> None:
        """Writes `CHECKSUMS` into a checkpoint that is about to appear, before Orbax renames its folder."""
        if not is_writer() or "://" in os.fspath(self.directory):
            return
        for folder in Path(self.directory).glob(f"{self._saving}.*tmp*"):
            names = [name for name in _files(folder) if name not in UNSUMMED]
            write_json(folder / CHECKSUMS, checksums(folder, names))

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: TrainingProgress, *, value: float | None = None) -> None:
        """Copies the state off the devices and writes it in the background; a saved step is left alone.

        Args:
            value: By which the best are chosen; None: this one is no candidate.
        """
        if step == self._manager.latest_step():
            return
        content = {"fingerprint": self.fingerprint, **dataclasses.asdict(progress)}
        self._bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state._asdict()))
        with full_disk_told(os.fspath(self.directory), self._bytes):
            self._manager.wait_until_finished()  # `_sum` may still need the number of the one before
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()), progress=ocp.args.JsonSave(content)
                ),
                metrics=None if value is None else {"value": value},
                force=True,
            )

    def wait(self) -> None:
        with full_disk_told(os.fspath(self.directory), self._bytes):
            self._manager.wait_until_finished()

    def restore(self, target: TrainState) -> tuple[TrainState, TrainingProgress] | None:
        """The latest whole state on the shardings of `target`, and the progress; None where there is none yet.

        A checkpoint that is damaged, or of another training while an earlier one is of this, is set aside with a
        warning, and the one before it is taken.

        Raises:
            UserError: the checkpoints belong to other data or other settings, or none of them is whole.
        """
        reasons: dict[int, str] = {}
        foreign = False
        for step in sorted(self._manager.all_steps(), reverse=True):
            reason = checkpoint_damage(self.directory, step)
            if reason is None:
                try:
                    restored = self._restored(step, target)
                except (MemoryError, jax.errors.JaxRuntimeError):  # nothing is wrong with the files
                    raise
                except Exception as error:
                    if jax.process_count() > 1:  # the others may wait for this one inside Orbax
                        raise _unreadable(self.directory / str(step), error) from error
                    reason = f"cannot be read ({_first_line(error)})"
                else:
                    if restored is not None:
                        self._put_aside(reasons)
                        return restored
                    reason, foreign = "is of another training", True
            reasons[step] = reason
        if foreign:
            raise UserError(
                "the checkpoints there were made with other data or settings",
                where=str(self.directory),
                remedy="restore the earlier recipe and data, or remove the folder to start anew",
            )
        if reasons:
            step, reason = next(iter(reasons.items()))
            raise UserError(
                f"no checkpoint there is whole (step {step} {reason})",
                where=str(self.directory),
                remedy="put a copy in its place, or remove the folder to start the training anew",
            )
        return None

    def _restored(self, step: int, target: TrainState) -> tuple[TrainState, TrainingProgress] | None:
        """The state and progress of a checkpoint; None if it is of another training."""
        loaded = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        progress = dict(loaded["progress"])
        if progress.pop("fingerprint") != self.fingerprint:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target._asdict()
        )
        loaded = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return TrainState(**loaded["state"]), TrainingProgress(**progress)

    def _put_aside(self, reasons: Mapping[int, str]) -> None:
        """Moves checkpoints out of the way, so that their steps can be saved again."""
        if not reasons:
            return
        if is_writer():
            for step, reason in reasons.items():
                place = free_name(Path(self.directory).parent / SET_ASIDE / "damaged" / f"checkpoint-{step}")
                place.parent.mkdir(parents=True, exist_ok=True)
                (Path(self.directory) / str(step)).rename(place)
                _logger.warning(
                    "%s %s: set aside in %s; the checkpoint before it is taken",
                    self.directory / str(step),
                    reason,
                    place,
                )
        barrier("damaged checkpoints are set aside")
        self._manager.reload()


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def _unreadable(folder: epath.Path, error: BaseException) -> UserError:
    return UserError(
        f"the checkpoint cannot be read ({_first_line(error)})",
        where=str(folder),
        remedy="put a copy in its place, or remove it: the same command continues from the one before",
    )


def checkpoint_damage(directory: str | os.PathLike[str], step: int) -> str | None:
    """What is wrong with the files of a checkpoint, as process 0 sees them, on every process; None if nothing is.

    One without `CHECKSUMS` (an earlier version's) cannot be told apart from what was written.
    """
    reason = None
    if is_writer() and "://" not in os.fspath(directory):
        reason = _damage(Path(directory) / str(step))
    return (reason or "is not what was written") if agreed([reason is not None])[0] else None


def _damage(folder: Path) -> str | None:
    sums = checkpoint_sums(folder)
    if sums is None:
        return f"has damaged checksums ({CHECKSUMS})" if (folder / CHECKSUMS).exists() else None
    current = checksums(folder, sums)
    for name, value in sums.items():
        if current[name] != value:
            return f"is damaged ({name} {'is gone' if current[name] is None else 'has another checksum'})"
    return None


def checkpoint_sums(folder: Path) -> dict[str, str] | None:
    """File -> SHA-256 of a checkpoint, as it was written; None where that is not known."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return sums if isinstance(sums, dict) and all(isinstance(value, str) for value in sums.values()) else None


def best_step(directory: str | os.PathLike[str], metric: str) -> int | None:
    """The step of the checkpoint with the best `metric`; None where none has one."""
    mode = "min" if is_minimised(metric) else "max"
    options = ocp.CheckpointManagerOptions(best_fn=_best_value, best_mode=mode)
    with ocp.CheckpointManager(Path(directory).absolute(), options=options) as manager:
        return manager.best_step()


def restore_trainable(
    directory: str | os.PathLike[str],
    target: Parameters,
    *,
    weights: str = "last",
    metric: str = "loss",
) -> Parameters:
    """Trained parameters alone, on the shardings of `target`: no data, no optimizer is needed.

    Args:
        weights: ``last``, ``ema`` (the moving average, of the last checkpoint), or ``best`` by `metric`.

    Raises:
        UserError: there is no such checkpoint, or it holds other parameters.
    """
    where = str(directory)
    with ocp.CheckpointManager(Path(directory).absolute()) as manager:
        step = best_step(directory, metric) if weights == "best" else manager.latest_step()
        if step is None:
            raise UserError("no checkpoint", where=where, remedy="run `m3po train` first")
        if (reason := checkpoint_damage(directory, step)) is not None:
            raise UserError(
                f"the checkpoint of step {step} {reason}",
                where=where,
                remedy="put a copy in its place, or train again: `m3po train` goes on from the checkpoint before it",
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        name = "ema" if weights == "ema" else "trainable"
        item = {name: abstract}
        try:
            loaded = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        item=item,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                        partial_restore=True,
                    )
                ),
            )
        except (ValueError, KeyError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"the checkpoint holds other parameters ({reason})",
                where=where,
                remedy="use the recipe that it was trained with",
            ) from None
        except Exception as error:  # Orbax and TensorStore raise many types for files that they cannot read
            raise _unreadable(epath.Path(where) / str(step), error) from error
    return loaded["state"][name]
