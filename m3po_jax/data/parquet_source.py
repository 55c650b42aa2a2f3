"""Prompts of parquet files: texts in memory, images read when they are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from m3po_jax.config import DataConfig
from m3po_jax.data import parquet_bounds, schema, tables
from m3po_jax.data.checker import Checker
from m3po_jax.data.prompt_list import PromptList, image_file_hashes
from m3po_jax.data.rows import IMAGE_KEYS, parse_images
from m3po_jax.errors import UserError

Place = tuple[int, int, int]  # file, row group, row in it
_SHELL = {"bytes": b"-"}  # stands for an image while the texts of its row are checked
_KEPT_BYTES = 1 << 27


class ParquetColumn:
    """One column of parquet files, of which rows are read when they are asked for.

    A few row groups are kept, because shuffled access would otherwise read a whole group for each row.
    """

    def __init__(self, files: Sequence[Path], column: str):
        self.files, self.column = list(files), column
        self._groups: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def value(self, place: Place) -> Any:
        """What the column holds for a row.

        Raises:
            UserError: the file is damaged or unpacks to too much.
        """
        file, group, row = place
        return self._group(file, group)[row].as_py()

    def _group(self, file: int, group: int) -> pa.ChunkedArray:
        with self._lock:
            column = self._groups.pop((file, group), None)
            if column is None:
                column = self.read(file, group)
            self._groups[file, group] = column
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > _KEPT_BYTES:
                self._groups.popitem(last=False)
                pa.default_memory_pool().release_unused()  # its allocator would keep some groups' worth
        return column

    def read(self, file: int, group: int) -> pa.ChunkedArray:
        """The column of one row group."""
        path = self.files[file]
        with tables.open_parquet(path) as opened, tables.damaged(path):
            parts = list(parquet_bounds.batches(opened, group, [self.column], str(path), rows=64))
            types = opened.schema_arrow.field(self.column).type
        return pa.chunked_array([part.column(0) for part in parts], types)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "column": self.column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class ParquetImages(ParquetColumn):
    """The image column of parquet files."""

    def __init__(self, files: Sequence[Path], column: str, exif: str):
        super().__init__(files, column)
        self.exif = exif

    def images(self, place: Place) -> Sequence[schema.Image]:
        """The images of a row.

        Raises:
            UserError: as `value`.
        """
        file, group, row = place
        return parse_images(self.value(place), f"{self.files[file]}:row group {group}, row {row}", exif=self.exif)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "exif": self.exif}


class ParquetSource(PromptList):
    """Prompts of parquet files; no row holds an image's bytes."""

    def __init__(
        self,
        prompts: Sequence[schema.Prompt],
        image_root: Path,
        notes: Sequence[str],
        files: Sequence[Path],
        exif: str,
        has_paths: bool,
    ):
        super().__init__(prompts, image_root, notes)
        self.files, self.exif, self._has_paths = list(files), exif, has_paths

    def content(self) -> Iterator[Any]:
        """The bytes of the files, which rows are taken, and the image files that they name."""
        yield [tables.file_hash(path) for path in self.files]
        yield [prompt.id for prompt in self]
        if self.exif != "apply":
            yield {"exif": self.exif}
        if self._has_paths:
            yield image_file_hashes(self, self.image_root)


def read_parquet(config: DataConfig, checker: Checker) -> ParquetSource:
    """The prompts of a parquet file or of a folder of them.

    Raises:
        UserError: no file, files of different columns, a damaged one, or one that unpacks to too much.
    """
    path = Path(config.path)
    files = [path] if path.is_file() else _split_files(tables.shards(path), config.split)
    if not files:
        raise UserError("no parquet file", where=str(path), remedy="check data.path and data.split")
    with tables.open_parquet(files[0]) as first:
        layout = first.schema_arrow
    names = layout.names
    image_column = next((name for name in IMAGE_KEYS if name in names), None)
    root = Path(config.image_root) if config.image_root else files[0].parent
    store = None if image_column is None else ParquetImages(files, image_column, checker.rules.exif)
    texts = [name for name in names if name != image_column and not _holds_bytes(layout.field(name).type)]
    checker.left_out |= dict.fromkeys(name for name in names if name not in (*texts, image_column))
    prompts: list[schema.Prompt] = []
    for number, file in enumerate(files):
        with tables.open_parquet(file) as opened, tables.damaged(file):
            if opened.schema_arrow.names != names:
                raise UserError(f"its columns differ from those of {files[0].name}", where=str(file))
            position = 0
            for group in range(opened.num_row_groups):
                counts = _image_counts(opened, group, image_column, str(file))
                for row, values in enumerate(_text_rows(opened, group, texts, file, position, checker)):
                    position += 1
                    if row >= len(counts):
                        raise UserError(
                            f"damaged: row group {group} has {len(counts)} rows of images and more of text",
                            where=str(file),
                            remedy="replace it",
                        )
                    if values is None:
                        continue
                    images: tuple[schema.Image, ...] = ()
                    if store is not None:
                        place = number, group, row
                        images = tuple(schema.StoredImage(store, place, i) for i in range(counts[row]))
                    prompt = checker.prompt(
                        values | {"images": [_SHELL] * counts[row]},
                        f"{file}:row {position - 1}",
                        str(len(prompts)),
                        root,
                        stored=images,
                    )
                    if prompt is not None:
                        prompts.append(prompt)
                        if len(prompts) == config.limit:
                            break
                else:
                    continue
                break
        if len(prompts) == config.limit:
            break
    has_paths = image_column is not None and _may_name_files(layout.field(image_column).type)
    return ParquetSource(prompts, root, checker.notes(config.path), files, checker.rules.exif, has_paths)


def _text_rows(
    opened: Any, group: int, columns: list[str], file: Path, position: int, checker: Checker
) -> Iterator[dict[str, Any] | None]:
    """Rows of a row group without their images; None for one whose texts are not UTF-8."""
    if not columns:
        yield from ({} for _ in range(opened.metadata.row_group(group).num_rows))
        return
    for batch in parquet_bounds.batches(opened, group, columns, str(file)):
        for row in tables.python_rows(batch):
            if isinstance(row, str):
                checker.report(UserError(row, where=f"{file}:row {position}", remedy="mend the row"))
                yield None
            else:
                yield row
            position += 1


def _split_files(files: list[Path], split: str) -> list[Path]:
    """Files named ``SPLIT-00000-of-00001.parquet`` of one split; all files, where none is so named."""
    hub = [file for file in files if "-of-" in file.stem]
    return [file for file in hub if file.name.startswith(f"{split}-")] if hub else files


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are, or hold, bytes."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _may_name_files(kind: pa.DataType) -> bool:
    """Whether an image column can hold paths without bytes."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    return any(_may_name_files(kind.field(i).type) for i in range(kind.num_fields))


def _image_counts(opened: Any, group: int, column: str | None, where: str) -> list[int]:
    """Images of each row of a row group, without reading their bytes where the column has paths as well."""
    if column is None:
        return [0] * opened.metadata.row_group(group).num_rows
    leaves = [opened.schema.column(i).path for i in range(len(opened.schema))]
    light = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]
    counts: list[int] = []
    for batch in parquet_bounds.batches(opened, group, light or [column], where):
        values = batch.column(0)
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            counts += pc.fill_null(pc.list_value_length(values), 0).to_pylist()
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            counts += [int(bool(length)) for length in pc.binary_length(values).to_pylist()]
        else:
            counts += [int(valid) for valid in values.is_valid().to_pylist()]
    return counts
