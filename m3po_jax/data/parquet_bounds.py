"""Bounds on what a parquet file unpacks to, checked before the memory is taken.

A few kilobytes can stand for gigabytes: by compression, which the footer tells of, and by a dictionary whose one long
value a million rows repeat, which only shows while they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from m3po_jax.errors import UserError

SUSPECT_BYTES = 1 << 28  # less never hurts
SUSPECT_RATIO = 100  # texts and images are packed to a tenth at best
_BATCH_BYTES = 1 << 26
_SUSPECT_ROWS = 1_000_000
_ROWS_OF_A_BYTE = 20


def _refuse(where: str, packed: float, unpacked: float, column: str = "") -> UserError:
    what = f"column {column!r}" if column else "the file"
    return UserError(
        f"{what} unpacks from {packed / 1e6:.2f} MB to {unpacked / 1e6:,.0f} MB or more",
        where=where,
        remedy="data are not packed so tightly; where you trust it, write it without compression and dictionaries",
    )


def _too_much(packed: float, unpacked: float) -> bool:
    return unpacked > SUSPECT_BYTES and unpacked > SUSPECT_RATIO * packed


def check_footer(file: pq.ParquetFile, where: str) -> None:
    """Raises UserError for a file whose footer tells of far more data than the file can hold."""
    metadata = file.metadata
    sizes: dict[str, tuple[int, int]] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            packed, unpacked = sizes.get(chunk.path_in_schema, (0, 0))
            sizes[chunk.path_in_schema] = (
                packed + chunk.total_compressed_size,
                unpacked + chunk.total_uncompressed_size,
            )
    for column, (packed, unpacked) in sizes.items():
        if _too_much(packed, unpacked):
            raise _refuse(where, packed, unpacked, column)
    total = sum(packed for packed, _ in sizes.values())
    if metadata.num_rows > max(_SUSPECT_ROWS, _ROWS_OF_A_BYTE * total):
        raise UserError(
            f"the file tells of {metadata.num_rows} rows in {total / 1e6:.2f} MB",
            where=where,
            remedy="no data are packed so tightly; write it anew",
        )


def batches(
    file: pq.ParquetFile, group: int, columns: Sequence[str], where: str, *, rows: int = 1024
) -> Iterator[pa.RecordBatch]:
    """A row group's columns, in batches that are small enough to stop in time.

    Raises:
        UserError: the group unpacks to far more than its bytes in the file.
    """
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    chunks_read = [
        chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in {name.split(".")[0] for name in columns}
    ]
    packed = sum(chunk.total_compressed_size for chunk in chunks_read)
    # No value is longer than its chunk.
    longest = max((chunk.total_uncompressed_size for chunk in chunks_read), default=1)
    rows = max(1, min(rows, _BATCH_BYTES // max(longest, 1)))
    unpacked = 0
    for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=list(columns)):
        unpacked += batch.nbytes
        if _too_much(packed, unpacked):
            raise _refuse(where, packed, unpacked)
        yield batch
