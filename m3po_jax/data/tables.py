"""Files of a run directory: parquet shards and JSON lines, complete or absent.

A file is written under a temporary name in its own folder, flushed to disk and renamed, so a reader sees a
whole file or none, whenever a writer is killed. A shard's name carries a hash of what it was made from, so a
repeated command knows what is already done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from m3po_jax.data import parquet_bounds
from m3po_jax.errors import UserError, system_failure

_TEMPORARY = ".tmp"
# Small row groups let shuffled readers fetch a row without its whole file.
_ROW_GROUP_ROWS = 64
_ROW_GROUP_BYTES = 1 << 26
MAX_LINE_BYTES = 1 << 28
# What Arrow raises for a parquet file that is damaged; names of columns in its footer may not be UTF-8.
_DAMAGE = (OSError, pa.ArrowException, UnicodeDecodeError)


@contextlib.contextmanager
def atomic_write(path: str | Path, *, record: Callable[[str], None] | None = None) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` when the block ends without an exception, and not before.

    Args:
        record: Called with the SHA-256 (hex) of the whole file just before it appears, so that no file is there whose
            checksum is not on disk, whenever a writer is killed.

    Raises:
        UserError: the disk is full, or nothing may be written there; what was at `path` before is still there.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The leading dot and the suffix keep the temporary out of every reader's way.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if record is not None:
            record(file_hash(temporary))
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would lock out the other users of a shared folder
        temporary.replace(path)
    except BaseException as error:
        written = 0
        if temporary is not None:
            with contextlib.suppress(OSError):
                written = temporary.stat().st_size
            temporary.unlink(missing_ok=True)
        explained = None if isinstance(error, UserError) else system_failure(error, path, written)
        if explained is not None:
            raise explained from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_table(rows: Iterable[Mapping[str, Any]] | Mapping[str, Sequence[Any]], schema: pa.Schema) -> pa.Table:
    """Rows or columns as an Arrow table of `schema`; absent nullable fields become null.

    Raises:
        ValueError: a field that `schema` does not have, a missing field that must not be null, or a value of
            another type.
    """
    if isinstance(rows, Mapping):
        columns = {name: list(values) for name, values in rows.items()}
    else:
        rows = list(rows)
        unknown = {name for row in rows for name in row} - set(schema.names)
        if unknown:
            raise ValueError(f"fields {sorted(unknown)} are not in the schema {schema.names}")
        columns = {name: [row.get(name) for row in rows] for name in schema.names}
    unknown = set(columns) - set(schema.names)
    if unknown:
        raise ValueError(f"fields {sorted(unknown)} are not in the schema {schema.names}")
    count = len(next(iter(columns.values()), ()))
    arrays = []
    for field in schema:
        values = columns.get(field.name, [None] * count)
        try:
            array = pa.array(values, field.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(f"field {field.name!r} is not {field.type}: {error}") from None
        if not field.nullable and array.null_count:
            raise ValueError(f"field {field.name!r} must not be null")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema)


def write_table(
    path: str | Path,
    rows: pa.Table | Iterable[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
    schema: pa.Schema,
    *,
    record: Callable[[str], None] | None = None,
) -> None:
    """Writes a parquet file atomically.

    Args:
        path: The file; folders above it are made.
        rows: A table, one dictionary of columns, or dictionaries, of which no more are held than make a row group.
        schema: Types and order of the columns, see `m3po_jax.data.schema`.
        record: As of `atomic_write`.

    Raises:
        ValueError: rows that do not fit `schema`.
    """
    parts: Iterable[pa.Table]
    if isinstance(rows, pa.Table):
        parts = [rows.cast(schema)]
    elif isinstance(rows, Mapping):
        parts = [to_table(rows, schema)]
    else:
        parts = (to_table(group, schema) for group in _row_groups(rows))
    with atomic_write(path, record=record) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(part, row_group_size=_ROW_GROUP_ROWS)


def _row_groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Rows of one row group each: few, and of images no more than `_ROW_GROUP_BYTES`, one row at least."""
    group: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        weight = sum(len(image.get("bytes") or b"") for image in row.get("images") or ())
        if group and (len(group) == _ROW_GROUP_ROWS or size + weight > _ROW_GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(row)
        size += weight
    if group:
        yield group


def shards(directory: str | Path, suffix: str = ".parquet") -> list[Path]:
    """Complete shards of `directory`, sorted by name; empty where there is no such folder."""
    folder = Path(directory)
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix == suffix and not path.name.startswith(".") and path.is_file()
    )


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """A parquet file for reading.

    Raises:
        UserError: missing, truncated, not parquet, or of far more data than the file can hold.
    """
    try:
        file = pq.ParquetFile(path)
        parquet_bounds.check_footer(file, str(path))
        return file
    except _DAMAGE as error:
        reason = "no such file" if not Path(path).exists() else _first_line(error)
        raise UserError(
            f"cannot read the parquet file ({reason})",
            where=str(path),
            remedy="replace it; what a run has made can be deleted, and the same command makes it again",
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def damaged(path: str | Path) -> Iterator[None]:
    """What Arrow raises while it reads a parquet file becomes one line."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(
            f"damaged shard ({_first_line(error)})",
            where=str(path),
            remedy="replace it; what a run has made can be deleted, and the same command makes it again",
        ) from None


def python_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """The rows of a batch; in place of one that Python cannot hold, the reason."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # not UTF-8, or a time that Python does not have
        rows: list[dict[str, Any] | str] = []
        for number in range(batch.num_rows):
            try:
                rows += batch.slice(number, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                rows.append("a text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error))
        return rows


def read_rows(directory: str | Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of all complete shards of a folder (or of one file), shards in order of their names.

    Args:
        directory: A folder of parquet shards, or one parquet file.
        columns: Fields to read; None: all.

    Raises:
        UserError: a damaged shard, or a column that is not there.
    """
    path = Path(directory)
    for shard in [path] if path.is_file() else shards(path):
        with open_parquet(shard) as file:
            missing = set(columns or ()) - set(file.schema_arrow.names)
            if missing:
                raise UserError(f"no column {sorted(missing)[0]!r}", where=str(shard))
            with damaged(shard):
                for batch in file.iter_batches(batch_size=_ROW_GROUP_ROWS, columns=columns):
                    yield from batch.to_pylist()


def write_json_lines(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, record: Callable[[str], None] | None = None
) -> None:
    """Writes one JSON object per line atomically; NaN and infinities are refused (they are not JSON)."""
    with atomic_write(path, record=record) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n")


def write_json(path: str | Path, value: Any, *, record: Callable[[str], None] | None = None) -> None:
    """Writes one JSON value atomically, keys sorted; NaN and infinities are refused."""
    with atomic_write(path, record=record) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("utf-8"))


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for each line that is not blank; `where` is ``file:line``.

    Raises:
        UserError: missing file, a line that is not UTF-8 or not a JSON object.
    """
    for where, line in json_lines(path):
        yield where, parse_json_object(line, where)


def json_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """(where, line) for each line of a file that is not blank; `where` is ``file:line``.

    Raises:
        UserError: missing file, or a line of more than `MAX_LINE_BYTES`.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise UserError(reason, where=str(path), remedy="check the path") from None
    with file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"a line of more than {MAX_LINE_BYTES} bytes", where=where, remedy="one JSON object per line"
                )
            if line.strip():
                yield where, line


def parse_json_object(data: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object; UserError where it is malformed or something else."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        row = json.loads(text)
    except UnicodeDecodeError:
        raise UserError("not UTF-8", where=where, remedy="save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"malformed JSON: {error}", where=where, remedy="one JSON object per line") from None
    if not isinstance(row, dict):
        raise UserError("not a JSON object", where=where, remedy="one JSON object per line")
    return row


def content_hash(*parts: Any) -> str:
    """SHA-256 (hex) of bytes, texts and anything that JSON can hold; the same in every process.

    Mappings are hashed in the order of their keys. Every part is framed by its kind and length, so that
    ("ab", "c") and ("a", "bc") differ.

    Raises:
        TypeError: a part that is not bytes and not JSON.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, (bytes, bytearray, memoryview)):
            kind, data = b"b", bytes(part)
        else:
            kind = b"j"
            data = json.dumps(part, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
        digest.update(kind + len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_name(index: int, inputs_hash: str) -> str:
    """``00042-0123456789abcdef.parquet``: sorts by index, changes with the inputs."""
    return f"{index:05d}-{inputs_hash[:16]}.parquet"
