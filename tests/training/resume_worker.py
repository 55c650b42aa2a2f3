"""One process of a training stage; `test_resume.py` starts, stops and kills it.

    resume_worker.py FOLDER [how step]

`how`: ``term`` sends SIGTERM to itself after the step, ``kill`` SIGKILL, ``kill-in-save`` SIGKILL as soon as the
checkpoint of that step has begun to appear on disk. Rows are written to ``order.jsonl`` as the loop takes them, and
at the end the parameters, the moving average and the optimizer's state to ``final.npz``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from training_tools import base_config, tiny_model, tiny_pairs

from m3po_jax.config import MeshConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.errors import Interrupted
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.hosts.startup import initialize_distributed
from m3po_jax.training.loop import train

# A large ε: see mesh_worker.py; what one and two processes compute differs by rounding alone.
CONFIG = base_config(
    max_steps=9,
    save_steps=2,
    ema_decay=0.9,
    keep_checkpoints=2,
    keep_best=1,
    log_steps=1,
    learning_rate=2e-3,
    adam_epsilon=1e-3,
    chosen_nll_weight=0.3,
)


@dataclasses.dataclass(frozen=True)
class Recorded(BatchSource):
    """A source that writes down which rows the loop takes as which batch."""

    file: Path | None = None

    def __iter__(self) -> Any:
        return RecordedIterator(super().__iter__(), self.file)


class RecordedIterator:
    def __init__(self, inner: Any, file: Path | None):
        self.inner, self.file = inner, file

    def __next__(self) -> Any:
        batch = next(self.inner)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(batch.row_index.tolist()) + "\n")
        return batch

    def get_state(self) -> Any:
        return self.inner.get_state()

    def set_state(self, state: Any) -> None:
        self.inner.set_state(state)


def kill_when_saving(folder: Path, step: int) -> None:
    """Ends the process without a word once the temporary folder of the step's checkpoint is there."""
    while True:
        names = [path.name for path in folder.glob(f"{step}.*")] if folder.is_dir() else []
        if any("tmp" in name for name in names):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0002)


def main(folder: Path, how: str = "", at: int = 0) -> None:
    initialize_distributed()
    source = tiny_pairs(CONFIG, length_window=2, max_shapes=2)
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(BatchSource)}
    first = jax.process_index() == 0
    batches = Recorded(**fields, file=folder / "order.jsonl" if first else None)
    if how == "kill-in-save":
        threading.Thread(target=kill_when_saving, args=(folder / "checkpoints", at), daemon=True).start()

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step == at and how in ("term", "kill"):
            os.kill(os.getpid(), signal.SIGTERM if how == "term" else signal.SIGKILL)
        if step == at and how == "kill-in-save":
            time.sleep(30)  # the other thread ends it

    mesh = make_mesh(MeshConfig())
    try:
        train(tiny_model(CONFIG), batches, CONFIG, output_dir=folder, mesh=mesh, on_step=on_step)
    except Interrupted as stopped:
        print(stopped)
        raise SystemExit(75) from None
    if first and jax.process_count() == 1:
        with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
            state = manager.restore(9, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
        leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
        np.savez(folder / "final.npz", **leaves)


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    main(Path(folder), *(rest[:1] or [""]), *(int(x) for x in rest[1:]))
