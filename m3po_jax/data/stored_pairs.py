"""Pairs that a run has written: texts in memory, images on disk until their row is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from m3po_jax.data import tables
from m3po_jax.data.pair_rows import TableRows
from m3po_jax.data.parquet_source import ParquetImages, Place


class StoredPairs(TableRows):
    """The rows of parquet shards of the schema PAIR, in order.

    Args:
        table: The rows without their images.
        places: Where the images of each row lie in `store`.
    """

    def __init__(self, table: pa.Table, places: Sequence[Place], store: ParquetImages):
        super().__init__(table)
        self._places, self._store = places, store

    @classmethod
    def open(cls, files: Sequence[Path]) -> StoredPairs:
        """
        Raises:
            UserError: a file is damaged, or no pair's.
        """
        parts: list[pa.Table] = []
        places: list[Place] = []
        for number, path in enumerate(files):
            with tables.open_parquet(path) as file, tables.damaged(path):
                parts.append(file.read(columns=[name for name in file.schema_arrow.names if name != "images"]))
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            places += [(number, group, row) for group, size in enumerate(sizes) for row in range(size)]
        return cls(
            pa.concat_tables(parts, promote_options="default"), places, ParquetImages(files, "images", "apply")
        )

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        if isinstance(index, slice):
            return row
        return row | {"images": self._store.value(self._places[range(len(self))[index]]) or []}

    def take(self, numbers: Sequence[int]) -> StoredPairs:
        return StoredPairs(
            self.table.take(pa.array(numbers, pa.int64())), [self._places[number] for number in numbers], self._store
        )
