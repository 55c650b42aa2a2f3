"""A folder of parquet shards and its record: which are whole, which belong, and what they are together."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3po_jax.data import tables
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError
from m3po_jax.workspace.checksums import checksums
from m3po_jax.workspace.files import read_json
from m3po_jax.workspace.layout import CALIBRATION
from m3po_jax.workspace.records import Artifact, Record, differences, in_words


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class ShardFolder(Artifact):
    """The shards of one stage. Only the process that writes calls `begin`, `noting` and `finish`.

    Args:
        folder: Holds ``NNNNN-HASH.parquet`` and the record.
        remade_by: The command that makes a shard again, for messages.
    """

    def __init__(self, folder: Path, remade_by: str):
        super().__init__(folder)
        self.remade_by = remade_by

    def begin(
        self, inputs: Mapping[str, Any], names: Sequence[str], derived: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Makes the folder ready for shards `names` of `inputs`, and tells in lines what it set aside.

        Shards that other inputs made, and those that are not what was written, are set aside. One of the right name
        that no record knows (an earlier version's) is taken over: its name carries a hash of its inputs.
        """
        lines = []
        record = self.read()
        changes = [] if record is None else differences(record.inputs, inputs)
        if changes:
            place = self.set_aside() if self.exists() else None
            if place is not None:
                lines.append(f"{self.folder}: out of date ({in_words(changes)}); set aside in {place}")
            record = None
        outputs = {} if record is None else dict(record.outputs)
        present = [path.name for path in tables.shards(self.folder)]
        sums = checksums(self.folder, present)
        for name in present:
            if name not in names or outputs.get(name, sums[name]) != sums[name]:
                reason = "is not what was written (its checksum differs)" if name in names else "is of other inputs"
                lines.append(f"{self.folder / name}: {reason}; set aside in {self.set_file_aside(name).parent}")
                outputs.pop(name, None)
            else:
                outputs[name] = sums[name] or ""
        outputs = {name: value for name, value in outputs.items() if (self.folder / name).exists()}
        finished = record is not None and record.finished is not None and outputs == record.outputs
        if record is not None and finished:
            return lines
        derived = dict(derived or {}) if record is None else record.derived
        self.write(Record(dict(inputs), outputs, derived))
        return lines

    def noting(self, name: str) -> Callable[[str], None]:
        """What `tables.atomic_write` calls with the checksum of a shard that is about to appear."""

        def note(value: str) -> None:
            record = self.read()
            assert record is not None, "begin() comes before the first shard"
            self.write(dataclasses.replace(record, outputs={**record.outputs, name: value}))

        return note

    def reopen(self) -> None:
        """Marks the folder as unfinished: some of its shards are made again from the same inputs."""
        record = self.read()
        if record is not None and record.finished is not None:
            self.write(dataclasses.replace(record, finished=None))

    def derive(self, derived: Mapping[str, Any]) -> None:
        """Notes the settings that the shards' derived columns now have."""
        record = self.read()
        assert record is not None, "begin() comes first"
        self.write(dataclasses.replace(record, derived=dict(derived)))

    def finish(self, details: Mapping[str, Any]) -> Record:
        """Marks the folder as finished, with its counts for the manifest, if it is not yet; returns the record."""
        record = self.read()
        assert record is not None, "begin() comes before finish()"
        if record.finished is None:
            record = dataclasses.replace(record, finished=now(), details=dict(details))
            self.write(record)
        return record

    def content(self) -> str:
        """A hash of the shards' bytes, in order, which are verified; of an earlier version's as they are.

        Raises:
            UserError: a shard is not what was written, or cannot be read.
        """
        return content_hash(self.shard_checksums())

    def recorded_content(self) -> str:
        """`content` as the record has it, without reading a shard."""
        record = self.read()
        outputs = {} if record is None else record.outputs
        names = sorted(name for name in outputs if name.endswith(".parquet") and "/" not in name)
        return content_hash([record.outputs[name] for name in names] if record is not None else [])

    def shard_checksums(self) -> list[str]:
        """Of the shards in order; see `content`."""
        self.verify(remedy=f"`{self.remade_by}` makes it again")
        paths = tables.shards(self.folder)
        sums = checksums(self.folder, [path.name for path in paths])
        for name, value in sums.items():
            if value is None:
                raise UserError("cannot be read", where=str(self.folder / name))
        return [value or "" for value in sums.values()]


class ScoreFolder(ShardFolder):
    """The shards of scores, and what their judge is worth."""

    def calibration(self) -> dict[str, Any]:
        """Empty where nothing was scored."""
        return read_json(self.folder / CALIBRATION) or {}

    def save_calibration(self, content: Mapping[str, Any]) -> None:
        tables.write_json(self.folder / CALIBRATION, content)
