"""The record of a training: its checkpoints and logs lie in its folder among the files of other stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.workspace.checksums import checksums
from m3po_jax.workspace.layout import CHECKPOINTS, DONE, RESULTS, REWARD_DESCRIPTION, TRAINING, TRAINING_FILES
from m3po_jax.workspace.records import Artifact, Record
from m3po_jax.workspace.shards import now


class TrainingArtifact(Artifact):
    """What one training leaves in `folder`."""

    def __init__(self, folder: Path):
        super().__init__(folder, home=folder, record=TRAINING, entries=lambda _: TRAINING_FILES)

    @property
    def unrecorded(self) -> bool:
        """Whether something was trained there and nothing readable tells from what."""
        return self.read() is None and any((self.folder / name).exists() for name in (CHECKPOINTS, DONE))

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Notes what a training is made from, before its first step."""
        self.write(Record(dict(inputs)))

    def finish(self, inputs: Mapping[str, Any], details: Mapping[str, Any]) -> Record:
        """Marks a training as finished, with the checksums of its mark and its last checkpoint."""
        steps = [int(path.name) for path in (self.folder / CHECKPOINTS).glob("*") if path.name.isdigit()]
        names = [name for name in (DONE, RESULTS, REWARD_DESCRIPTION) if (self.folder / name).is_file()]
        last = self.folder / CHECKPOINTS / str(max(steps, default=0))
        names += sorted(str(path.relative_to(self.folder)) for path in last.rglob("*") if path.is_file())
        outputs = {name: value for name, value in checksums(self.folder, names).items() if value is not None}
        record = Record(dict(inputs), outputs, finished=now(), details=dict(details))
        self.write(record)
        return record
