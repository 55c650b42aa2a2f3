"""The JSON-lines files of a training stage, in step with its checkpoints, and the trackers that show the numbers.

`metrics.jsonl` and `warnings.jsonl` hold what is a function of data and settings: a run stopped and continued
leaves the same bytes as one never stopped. Times are in `timing.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from m3po_jax.data.tables import atomic_write
from m3po_jax.errors import UserError, full_disk_told, nearest


class MetricsLog:
    """Appends lines to `path`; `truncate` drops what a restored run will write again."""

    def __init__(self, path: Path, *, enabled: bool = True):
        self.path, self.enabled = path, enabled

    def truncate(self, step: int) -> None:
        """Keeps the lines up to `step`; a line cut by a crash is dropped, too."""
        if not self.enabled or not self.path.is_file():
            return
        kept = [line for line in self.path.read_bytes().split(b"\n") if _step(line) <= step]
        with atomic_write(self.path) as file:
            file.write(b"".join(line + b"\n" for line in kept))

    def lines(self, step: int) -> list[dict[str, Any]]:
        """The whole lines up to `step` (on every process: all of them decide by it)."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        return [json.loads(line) for line in content.split(b"\n") if _step(line) <= step]

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one line, on disk when this returns, and returns it; numbers that JSON lacks become null."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        if self.enabled:
            data = json.dumps(line, ensure_ascii=False) + "\n"
            with full_disk_told(self.path, len(data)), self.path.open("a", encoding="utf-8") as file:
                file.write(data)
        return line


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _step(line: bytes) -> float:
    """The step of a line; infinite for what is not one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, for reports; one that a crash has cut is left out, as `truncate` does."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [json.loads(line) for line in lines if _step(line) < math.inf]


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
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
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
