"""What a selection leaves: one shard of pairs, the dropped prompts with their reasons, and a summary."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from m3po_jax.data import tables
from m3po_jax.data.schema import PAIR, PROMPT
from m3po_jax.data.stored_pairs import StoredPairs
from m3po_jax.errors import UserError
from m3po_jax.workspace.checksums import checksum
from m3po_jax.workspace.files import read_json
from m3po_jax.workspace.layout import DROPS, PROMPTS, SUMMARY
from m3po_jax.workspace.records import Record
from m3po_jax.workspace.shards import ShardFolder, now


class PairFolder(ShardFolder):
    """One folder of pairs.

    Args:
        neighbours: Folders of pairs of the same round, in any system.
    """

    def __init__(self, folder: Path, neighbours: Sequence[Path] = ()):
        super().__init__(folder, "m3po select")
        self.neighbours = neighbours

    def summary(self) -> dict[str, Any]:
        """The counts of a selection; empty where there is none."""
        return read_json(self.folder / SUMMARY) or {}

    def content(self) -> str:
        """A hash of the pairs, which are verified.

        Raises:
            UserError: there are none, or they are not what was written.
        """
        if not tables.shards(self.folder):
            raise UserError("no pairs", where=str(self.folder), remedy="run `m3po select` first")
        return super().content()

    def pairs(self) -> StoredPairs:
        """All pairs, verified; images stay in their file until their row is asked for.

        Raises:
            UserError: there are none, or nothing survived the selection.
        """
        self.content()
        pairs = StoredPairs.open(tables.shards(self.folder))
        if not len(pairs):
            raise UserError(
                "no prompt gave a pair", where=str(self.folder), remedy=f"see {DROPS} beside it; loosen select.*"
            )
        return pairs

    def save(
        self,
        inputs: Mapping[str, Any],
        pairs: Iterable[Mapping[str, Any]],
        drops: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        prompts: Iterable[Mapping[str, Any]],
        *,
        started: float,
    ) -> None:
        """Writes a finished selection.

        Args:
            pairs: Read as they are written, and not at all where a neighbour has them.
            prompts: All prompts, for tracing rows back; they stand in the folder around.
            started: When the selection began, of the monotonic clock.
        """
        sums: dict[str, str] = {}
        shard = self.folder / tables.shard_name(0, tables.content_hash(inputs))
        if self._share(shard):
            sums[shard.name] = checksum(shard) or ""
        else:
            tables.write_table(shard, pairs, PAIR, record=partial(sums.__setitem__, shard.name))
        tables.write_json_lines(self.folder / DROPS, drops, record=partial(sums.__setitem__, DROPS))
        # Beside the folder, since it shows all prompts; the report reads it, and it is verified with the pairs.
        beside = f"../{PROMPTS}"
        tables.write_table(self.home / PROMPTS, prompts, PROMPT, record=partial(sums.__setitem__, beside))
        tables.write_json(self.folder / SUMMARY, summary, record=partial(sums.__setitem__, SUMMARY))
        details = {"seconds": time.monotonic() - started, "rows": summary["pairs"]}
        self.write(Record(dict(inputs), sums, finished=now(), details=details))

    def _share(self, shard: Path) -> bool:
        """Makes a shard a second name of one that a neighbour has; False where there is none.

        Pairs carry their images, so that TRL and `datasets` open the file alone. Arms of one rule choose the same
        pairs (the name of a shard is a hash of all that it is made from), and their images need to be on the disk
        once.
        """
        for twin in (folder / shard.name for folder in self.neighbours):
            if twin.is_file() and twin.resolve() != shard.resolve():
                shard.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(twin, shard)  # files of a run are replaced and never written to: the two stay alike
                except OSError:  # a file system without hard links
                    return False
                return True
        return False
