"""A training and what it was made from: whether what is there counts, and what becomes of it if it does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.config import TrainConfig
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import barrier, from_writer, is_writer
from m3po_jax.pipeline.console import say
from m3po_jax.workspace.records import DAMAGED, DONE, OUT_OF_DATE, UNFINISHED, Record, differences, in_words
from m3po_jax.workspace.training import TrainingArtifact

RUN_TRAIN = "run `m3po train` first"


def begin_training(folder: Path, inputs: Mapping[str, Any], *, force: bool = False) -> bool:
    """Whether the training of `inputs` in `folder` is finished and whole, on every process alike.

    Where it is not, the folder is ready for it when this returns: a finished one of other inputs is set aside; an
    unfinished one of the same inputs goes on.

    Args:
        force: An unfinished training of other inputs, and one without a record, are set aside too.

    Raises:
        UserError: an unfinished training of other inputs is there, or one of which nothing tells what it was made
            from.
    """
    artifact = TrainingArtifact(folder)
    status = from_writer(lambda: {**vars(artifact.status(inputs)), "unrecorded": artifact.unrecorded})
    state, reason = status["state"], status["reason"]
    if state == DONE:
        return True
    if state == UNFINISHED and not force:
        raise UserError(
            f"the unfinished training there was made from something else ({reason})",
            where=str(folder),
            remedy="put that back, choose another name=..., or add --force, which sets it aside and starts anew",
        )
    if status["unrecorded"] and not force:
        raise UserError(
            "nothing readable tells what the training there was made from",
            where=str(artifact.path),
            remedy="put it back (earlier versions had none), choose another name=..., or add --force, which sets the "
            "training aside and starts anew",
        )
    if is_writer():
        if state in (OUT_OF_DATE, UNFINISHED) or status["unrecorded"]:
            why = f"{state} ({reason})" if reason else state
            say(f"{folder}: the training is {why}; set aside in {artifact.set_aside()}", style="yellow")
        if state == DAMAGED:
            say(f"{folder}: the finished training is damaged ({reason}); it is mended", style="yellow")
        artifact.start(inputs)
    barrier("training is recorded")
    return False


def finish_training(folder: Path, inputs: Mapping[str, Any], seconds: float, **details: Any) -> None:
    """Records a finished training with its checksums; no process goes on before that is on disk."""
    if is_writer():
        TrainingArtifact(folder).finish(inputs, {"seconds": seconds, **details})
    barrier("training is finished")


def finished_record(folder: Path) -> Record:
    """The record of a finished training, on every process.

    Raises:
        UserError: it is not finished.
    """
    artifact = TrainingArtifact(folder)
    content = from_writer(lambda: vars(record) if (record := artifact.read()) is not None else None)
    if content is None or content["finished"] is None:
        unrecorded = " whose record can be read" if artifact.unrecorded else ""
        raise UserError(f"no finished training{unrecorded}", where=str(folder), remedy=RUN_TRAIN)
    return Record(**content)


def require_current(folder: Path, record: Record, inputs: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: a finished training was made from something else than `inputs`.
    """
    if changes := differences(record.inputs, inputs):
        raise UserError(
            f"the training there is out of date ({in_words(changes)})", where=str(folder), remedy=RUN_TRAIN
        )


def handed_on(record: Record, train: TrainConfig) -> str:
    """A hash of the weights that a finished training hands on: of its inputs, and of which weights are taken."""
    best = [train.keep_best, train.best_metric] if train.weights == "best" else []
    return content_hash(record.inputs, train.weights, *best)[:16]
