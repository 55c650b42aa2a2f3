"""What a stage has made is tied to what it was made from: one small JSON file beside it.

A record holds ``inputs``, a flat mapping of names to values (settings under their recipe keys; models, data and
earlier artifacts under a hash of their content), ``outputs``, the SHA-256 of every file, and, once the stage is
finished, when it was and its counts for the manifest. A stage is done if its record is finished, has the inputs that
the stage would get now, and the files are what it says. Otherwise it is made (again); what was there is set aside
under a hash of its inputs, never deleted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3po_jax.data.tables import content_hash, write_json
from m3po_jax.errors import UserError
from m3po_jax.recipes import essential, leaves
from m3po_jax.workspace.checksums import checksums
from m3po_jax.workspace.layout import RECORD, SET_ASIDE

DONE, TO_DO, OUT_OF_DATE, DAMAGED, UNFINISHED = "done", "to do", "out of date", "damaged", "unfinished"
PENDING = "(to be made)"  # the value of an input that an earlier stage has yet to make


def settings(name: str, section: Any) -> dict[str, Any]:
    """A section of a recipe as dotted keys with JSON values, without what changes nothing that is computed."""
    kept = essential({name: dataclasses.asdict(section)})[name]
    return {key: json.loads(json.dumps(value)) for key, value in leaves(kept, f"{name}.").items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text ``key old -> new`` for every input that differs; settings first, then hashes."""
    keys = sorted(
        (key for key in {*before, *now} if before.get(key) != now.get(key) or (key in before) != (key in now)),
        key=lambda key: (not ("." in key or key == "seed"), key),
    )
    return [f"{key} {_shown(before, key)} -> {_shown(now, key)}" for key in keys]


def _shown(inputs: Mapping[str, Any], key: str) -> str:
    if key not in inputs:
        return "(nothing)"
    value = inputs[key]
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]  # a hash
    return text if len(text) <= 60 else f"{text[:57]}..."


def in_words(changes: list[str]) -> str:
    """The first of several differences, and how many more there are."""
    more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
    return f"{changes[0]}{more}" if changes else ""


@dataclass(frozen=True)
class Record:
    """What an artifact was made from and what it consists of.

    Attributes:
        inputs: Name -> JSON value.
        outputs: File, relative to the artifact's folder -> SHA-256.
        derived: Settings that some columns depend on and the rest does not: they are brought up to date in place.
        finished: When, ISO 8601; None: the stage is not finished.
        details: Its counts and seconds, for the manifest.
    """

    inputs: dict[str, Any]
    outputs: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Any] = field(default_factory=dict)
    finished: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        return content_hash(self.inputs)[:16]

    @classmethod
    def parsed(cls, content: Any) -> Record | None:
        """The record that a JSON value is; None where it is none."""
        kinds: dict[str, Any] = dict.fromkeys(("inputs", "outputs", "derived", "details"), dict)
        kinds["finished"] = (str, type(None))
        if not isinstance(content, dict) or not all(isinstance(content.get(k), kind) for k, kind in kinds.items()):
            return None
        if not all(isinstance(value, str) for value in content["outputs"].values()):
            return None
        return cls(**{name: content[name] for name in kinds})


@dataclass(frozen=True)
class Status:
    """How an artifact stands to the inputs that its stage would get now: a state and its reason in words."""

    state: str
    reason: str = ""


class Artifact:
    """The files of one stage in one folder, and their record.

    Args:
        folder: Where the files are.
        home: The folder in whose ``set-aside/HASH/`` goes what is replaced; default: the one around `folder`.
        record: Name of the record.
        entries: The files and folders that belong to the artifact; None: the whole of `folder`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        home: Path | None = None,
        record: str = RECORD,
        entries: Callable[[Path], Iterable[str]] | None = None,
    ):
        self.folder, self.home, self.path = folder, home or folder.parent, folder / record
        self._entries = entries

    def read(self) -> Record | None:
        """The record; None where there is none, or none that can be read."""
        try:
            return Record.parsed(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            return None

    def write(self, record: Record) -> None:
        if record != self.read():
            write_json(self.path, dataclasses.asdict(record))

    def damaged(self, record: Record) -> list[str]:
        """The files that are not there or are not what was written, by name."""
        actual = checksums(self.folder, record.outputs)
        return sorted(name for name, value in record.outputs.items() if actual[name] != value)

    def verify(self, remedy: str) -> None:
        """
        Raises:
            UserError: a file is not what was written.
        """
        record = self.read()
        broken = [] if record is None else self.damaged(record)
        if broken:
            raise UserError(_damage(self.folder, broken), where=str(self.folder / broken[0]), remedy=remedy)

    def status(self, inputs: Mapping[str, Any], *, contents: bool = True) -> Status:
        """Whether what is there is what the stage would make.

        Args:
            contents: Read the files; False: only whether they are there.
        """
        record = self.read()
        if record is None:
            return Status(TO_DO, "the files there have no record" if self.exists() else "")
        changes = differences(record.inputs, inputs)
        if changes and record.finished is not None:
            return Status(OUT_OF_DATE, in_words(changes))
        if changes and self.exists():
            return Status(UNFINISHED, in_words(changes))
        if record.finished is None:
            return Status(TO_DO, "it has begun" if self.exists() else "")
        broken = (
            self.damaged(record)
            if contents
            else [name for name in sorted(record.outputs) if not (self.folder / name).is_file()]
        )
        return Status(DAMAGED, _damage(self.folder, broken)) if broken else Status(DONE)

    def names(self) -> list[str]:
        """The files and folders of the artifact that are there, but for the record."""
        if self._entries is not None:
            return [name for name in self._entries(self.folder) if (self.folder / name).exists()]
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []

    def exists(self) -> bool:
        return bool([name for name in self.names() if name != self.path.name])

    def set_aside(self) -> Path | None:
        """Moves everything into ``set-aside/HASH/``, the record last; returns where it is, None if there is nothing.

        The record leaves last: killed in between, the next call finds inputs that differ, and moves the rest.
        """
        record = self.read()
        if not self.exists() and record is None:
            return None
        place = self.home / SET_ASIDE / (record.hash if record is not None else "unrecorded")
        if self._entries is None:
            target = free_name(place / self.folder.relative_to(self.home))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.rename(target)
            return target
        place.mkdir(parents=True, exist_ok=True)
        for name in [*(name for name in self.names() if name != self.path.name), self.path.name]:
            if (self.folder / name).exists():
                shutil.move(self.folder / name, free_name(place / name))
        return place

    def set_file_aside(self, name: str) -> Path:
        """Moves one file, and drops it from the record."""
        record = self.read()
        place = self.home / SET_ASIDE / (record.hash if record is not None else "unrecorded") / self.folder.name
        place.mkdir(parents=True, exist_ok=True)
        target = free_name(place / name)
        (self.folder / name).rename(target)
        return target


def free_name(path: Path) -> Path:
    """`path`, or with ``-2``, ``-3``, ... where that is taken."""
    taken, number = path, 1
    while taken.exists():
        number += 1
        taken = path.with_name(f"{path.name}-{number}")
    return taken


def _damage(folder: Path, names: list[str]) -> str:
    first = "is gone" if not (folder / names[0]).exists() else "is not what was written (its checksum differs)"
    more = f", nor are {len(names) - 1} more files" if len(names) > 1 else ""
    return f"{names[0]} {first}{more}"
