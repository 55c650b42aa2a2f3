"""Checkpoints of a training stage: asynchronous, atomic, the last few kept, restorable onto any mesh.

A checkpoint holds the `TrainState`, the data position (a Grain iterator's JSON state) and a fingerprint of
data and settings. Frozen weights are not in it: with adapters, saving at every step is cheap.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from m3po_jax.errors import UserError
from m3po_jax.training.step import Parameters, TrainState


class Checkpointer:
    """A context manager around Orbax's; leaving it waits for what is being written."""

    def __init__(self, directory: str | os.PathLike[str], *, keep: int, fingerprint: str):
        if keep < 1:
            raise UserError(f"keep_checkpoints must be positive, not {keep}", where="train.keep_checkpoints")
        self.directory, self.fingerprint = epath.Path(os.fspath(directory)), fingerprint
        if "://" not in os.fspath(directory):
            self.directory = epath.Path(Path(directory).absolute())
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
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

    def save(self, step: int, state: TrainState, iterator_state: dict[str, Any]) -> None:
        """Copies the state off the devices and writes it in the background; a saved step is left alone."""
        if step == self._manager.latest_step():
            return
        progress = {"iterator": iterator_state, "fingerprint": self.fingerprint}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()), progress=ocp.args.JsonSave(progress)
            ),
            force=True,
        )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest state on the shardings of `target`, and the iterator state; None where there is none
        yet.

        Raises:
            UserError: the checkpoint belongs to other data or other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        loaded = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        progress = loaded["progress"]
        if progress["fingerprint"] != self.fingerprint:
            raise UserError(
                "the checkpoints there were made with other data or settings",
                where=str(self.directory),
                remedy="restore the earlier recipe and data, or remove the folder to start anew",
            )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target._asdict()
        )
        loaded = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return TrainState(**loaded["state"]), progress["iterator"]


def restore_trainable(directory: str | os.PathLike[str], target: Parameters) -> Parameters:
    """The latest trained parameters alone, on the shardings of `target`: no data, no optimizer is needed.

    Raises:
        UserError: there is no checkpoint, or it holds other parameters.
    """
    where = str(directory)
    with ocp.CheckpointManager(Path(directory).absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError("no checkpoint", where=where, remedy="run `m3po train` first")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        item = {"trainable": abstract}
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
    return loaded["state"]["trainable"]


def write_json(path: Path, content: Any) -> None:
    """Writes `content` under a temporary name and renames it: the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
