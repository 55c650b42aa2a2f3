"""Checkpoints of a training stage: asynchronous, atomic, the last and the best kept, restorable onto any mesh.

A checkpoint holds the `TrainState`, the data position (a Grain iterator's JSON state), counters and a fingerprint of
data and settings. The only random numbers of training are the order of rows, a function of the seed (in the
fingerprint) and the position. Frozen weights are not in it: with adapters, saving at every step is cheap.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from m3po_jax.config import TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.reading import check_value
from m3po_jax.training.step import Parameters, TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
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
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: Progress, *, value: float | None = None) -> None:
        """Copies the state off the devices and writes it in the background; a saved step is left alone.

        Args:
            value: By which the best are chosen; None: this one is no candidate.
        """
        if step == self._manager.latest_step():
            return
        content = {"fingerprint": self.fingerprint, **dataclasses.asdict(progress)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()), progress=ocp.args.JsonSave(content)
            ),
            metrics=None if value is None else {"value": value},
            force=True,
        )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self, target: TrainState) -> tuple[TrainState, Progress] | None:
        """The latest state on the shardings of `target`, and the progress; None where there is none yet.

        Raises:
            UserError: the checkpoint belongs to other data or other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        loaded = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        progress = dict(loaded["progress"])
        if progress.pop("fingerprint") != self.fingerprint:
            raise UserError(
                "the checkpoints there were made with other data or settings",
                where=str(self.directory),
                remedy="restore the earlier recipe and data, or remove the folder to start anew",
            )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target._asdict()
        )
        loaded = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return TrainState(**loaded["state"]), Progress(**progress)


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
    return loaded["state"][name]
