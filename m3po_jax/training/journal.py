"""What a training stage writes down as it goes: metrics, warnings and timing, each a file of JSON lines."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from m3po_jax.config import TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.training.guards import CollapseWatch
from m3po_jax.workspace.training import TrainingArtifact

_logger = logging.getLogger(__name__)


class Journal:
    """The three files of a stage; read them with `workspace.metrics_log.read_metrics`.

    Args:
        output: The stage's folder.
        enabled: This process writes; the others only keep count.

    Attributes:
        path: ``metrics.jsonl``.
    """

    def __init__(self, output: Path, config: TrainConfig, *, enabled: bool):
        self.config, self.enabled = config, enabled
        self._metrics, self._warnings, self._timing = TrainingArtifact(output).logs(enabled=enabled)
        self.path = self._metrics.path

    def continue_from(self, done: int) -> None:
        """Drops the lines after step `done`, which will be written again; call it before anything is written."""
        for file in (self._metrics, self._warnings, self._timing):
            file.truncate(done)
        self._history = self._metrics.lines(done)
        warned = any(line["kind"] == "collapse" for line in self._warnings.lines(done))
        self._watch = CollapseWatch(self.config.collapse_warning, self._history, warned=warned)

    def last(self) -> dict[str, float]:
        """The metrics of the last line; empty before the first."""
        line = self._history[-1] if self._history else {}
        return {name: value for name, value in line.items() if isinstance(value, float) and name != "epoch"}

    def warn(self, step: int, kind: str, message: str) -> None:
        """A line in ``warnings.jsonl`` and one for whoever looks on."""
        self._warnings.write(step, {"kind": kind, "message": message})
        if self.enabled:
            _logger.warning("step %d: %s", step, message)

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """A line of metrics; what it says of a collapsing policy becomes a warning."""
        self._history.append(self._metrics.write(step, numbers))
        collapse = self._watch.see(self._history[-1])
        if collapse is not None:
            self.warn(step, "collapse", collapse)

    def timing(self, step: int, numbers: Mapping[str, float]) -> None:
        self._timing.write(step, numbers)

    def value_of(self, step: int) -> float:
        """Mean of `best_metric` over the lines logged since the scheduled checkpoint before that of `step`.

        Raises:
            UserError: the metric is not logged.
        """
        before = (step - 1) // self.config.save_steps * self.config.save_steps
        values = [line.get(self.config.best_metric) for line in self._history if line["step"] > before]
        measured = [value for value in values if value is not None]
        if not measured:
            names = ", ".join(sorted(self._history[-1])) if self._history else "nothing"
            raise UserError(
                f"{self.config.best_metric!r} is not logged", where="train.best_metric", remedy=f"there are {names}"
            )
        return float(np.mean(measured))
