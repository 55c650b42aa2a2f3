"""Pairs that a run has written: texts in memory, images and prompts' tokens on disk until their row is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from m3po_jax.data import tables
from m3po_jax.data.pair_rows import TableRows
from m3po_jax.data.parquet_source import ParquetColumn, Place

_ON_DISK = ("images", "prompt_tokens")


class StoredPairs(TableRows):
    """The rows of parquet shards of the schema PAIR, in order.

    Args:
        table: The rows without what stays on disk.
        places: Where that lies of each row.
        columns: What stays on disk, as far as the shards have it: those of earlier versions have no `prompt_tokens`.
    """

    def __init__(self, table: pa.Table, places: Sequence[Place], columns: Mapping[str, ParquetColumn]):
        super().__init__(table)
        self._places, self._columns = places, columns

    @classmethod
    def open(cls, files: Sequence[Path]) -> StoredPairs:
        """
        Raises:
            UserError: a file is damaged, or no pair's.
        """
        parts: list[pa.Table] = []
        places: list[Place] = []
        everywhere = set(_ON_DISK)
        for number, path in enumerate(files):
            with tables.open_parquet(path) as file, tables.damaged(path):
                names = file.schema_arrow.names
                parts.append(file.read(columns=[name for name in names if name not in _ON_DISK]))
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            everywhere &= {"images", *names}
            places += [(number, group, row) for group, size in enumerate(sizes) for row in range(size)]
        columns = {name: ParquetColumn(files, name) for name in sorted(everywhere)}
        return cls(pa.concat_tables(parts, promote_options="default"), places, columns)

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        if isinstance(index, slice):
            return row
        place = self._places[range(len(self))[index]]
        row |= {name: column.value(place) for name, column in self._columns.items()}
        return row | {"images": row["images"] or []}

    def take(self, numbers: Sequence[int]) -> StoredPairs:
        return StoredPairs(
            self.table.take(pa.array(numbers, pa.int64())),
            [self._places[number] for number in numbers],
            self._columns,
        )
