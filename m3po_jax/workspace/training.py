"""The record of a training: its checkpoints and logs lie in its folder among the files of other stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.data.tables import write_json
from m3po_jax.workspace import layout
from m3po_jax.workspace.checksums import checksums
from m3po_jax.workspace.metrics_log import MetricsLog, read_metrics
from m3po_jax.workspace.records import Artifact, Record
from m3po_jax.workspace.shards import now


class TrainingArtifact(Artifact):
    """What one training leaves in `folder`."""

    def __init__(self, folder: Path):
        super().__init__(folder, home=folder, record=layout.TRAINING, entries=lambda _: layout.TRAINING_FILES)

    @property
    def checkpoints(self) -> Path:
        return self.folder / layout.CHECKPOINTS

    @property
    def rollouts(self) -> Path:
        """Where answers that are drawn while training are kept."""
        return self.folder / layout.ROLLOUTS

    @property
    def metrics_path(self) -> Path:
        return self.folder / layout.METRICS

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics that are whole; none before the first."""
        return read_metrics(self.metrics_path)

    def logs(self, *, enabled: bool) -> tuple[MetricsLog, MetricsLog, MetricsLog]:
        """Its metrics, warnings and timing, to write to."""
        metrics, warnings, timing = (
            MetricsLog(self.folder / name, enabled=enabled)
            for name in (layout.METRICS, layout.WARNINGS, layout.TIMING)
        )
        return metrics, warnings, timing

    @property
    def is_marked(self) -> bool:
        """Whether the mark of a finished training is there."""
        return (self.folder / layout.DONE).is_file()

    def marker(self) -> dict[str, Any] | None:
        """The mark of a finished training (its ``steps`` and last ``metrics``); None where none can be read."""
        try:
            content = json.loads((self.folder / layout.DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        kinds = {"steps": int, "metrics": dict}
        whole = isinstance(content, dict) and all(isinstance(content.get(key), kind) for key, kind in kinds.items())
        return content if whole else None

    def mark(self, content: Mapping[str, Any]) -> None:
        write_json(self.folder / layout.DONE, content)

    @property
    def unrecorded(self) -> bool:
        """Whether something was trained there and nothing readable tells from what."""
        return self.read() is None and any(
            (self.folder / name).exists() for name in (layout.CHECKPOINTS, layout.DONE)
        )

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Notes what a training is made from, before its first step."""
        self.write(Record(dict(inputs)))

    def finish(self, inputs: Mapping[str, Any], details: Mapping[str, Any]) -> Record:
        """Marks a training as finished, with the checksums of its mark and its last checkpoint."""
        steps = [int(path.name) for path in self.checkpoints.glob("*") if path.name.isdigit()]
        names = [
            name
            for name in (layout.DONE, layout.RESULTS, layout.REWARD_DESCRIPTION)
            if (self.folder / name).is_file()
        ]
        last = self.checkpoints / str(max(steps, default=0))
        names += sorted(str(path.relative_to(self.folder)) for path in last.rglob("*") if path.is_file())
        outputs = {name: value for name, value in checksums(self.folder, names).items() if value is not None}
        record = Record(dict(inputs), outputs, finished=now(), details=dict(details))
        self.write(record)
        return record
