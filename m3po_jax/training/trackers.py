"""The trackers that show a training's numbers beside its files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from m3po_jax.errors import UserError, nearest
from m3po_jax.workspace.layout import TENSORBOARD


class Tracker(Protocol):
    """Where numbers go beside the files."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; a continued run hides what the earlier process wrote beyond its checkpoint."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], done: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboardX is not installed", where="train.report_to", remedy="pip install 'm3po-jax[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=done + 1 if done else None)
        if not done:
            self.writer.add_text("settings", f"```json\n{json.dumps(settings, indent=1, sort_keys=True)}\n```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One Weights & Biases run per stage; its id is made of the folder, so that a continued stage continues it."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], done: int):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb is not installed", where="train.report_to", remedy="pip install 'm3po-jax[wandb]'"
            ) from None
        # The project and the mode come from WANDB_PROJECT and WANDB_MODE, as users of wandb expect.
        self.run = wandb.init(id=name, name=name, config=dict(settings), dir=str(folder), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


class Trackers:
    """All trackers of `report_to` as one context manager; only process 0 has any.

    Args:
        name: Of the run, for trackers that show several.
        done: Steps that were finished before.

    Raises:
        UserError: an unknown name, or a library that is not installed.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        folder: Path,
        *,
        name: str,
        settings: Mapping[str, Any],
        done: int,
        first: bool,
    ):
        for key in report_to:
            if key not in TRACKERS:
                raise UserError(f"unknown tracker {key!r}{nearest(key, TRACKERS)}", where="train.report_to")
        self.trackers = [TRACKERS[key](folder, name, settings, done) for key in report_to] if first else []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self.trackers:
            tracker.close()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(step, {key: value for key, value in numbers.items() if math.isfinite(value)})
