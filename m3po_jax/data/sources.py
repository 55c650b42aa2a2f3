"""Prompts from files: JSON lines, CSV, folders of images, parquet and TFDS, with random access.

Every source is a sequence of `schema.Prompt` with `__len__` and `__getitem__`, so `grain.MapDataset.source`
takes it as it is. Rows are checked once, when the source is opened; each error names file, row and id. Images are not
decoded here, and of a table's rows not kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from m3po_jax.config import DataConfig
from m3po_jax.data import schema, tables
from m3po_jax.data.checker import Checker
from m3po_jax.data.parquet_source import read_parquet
from m3po_jax.data.rows import RowRules
from m3po_jax.data.text_sources import read_text
from m3po_jax.data.tfds_source import read_tfds
from m3po_jax.errors import UserError
from m3po_jax.reading import check_values


@runtime_checkable
class PromptSource(Protocol):
    """Random access to prompts.

    Attributes:
        image_root: Folder that image paths are relative to.
        notes: What was done to the rows when they were read (bad ones left out, repeated ids numbered), a line each.
    """

    image_root: Path
    notes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> schema.Prompt: ...

    def content(self) -> Iterable[Any]:
        """What identifies the content, for `fingerprint`."""
        ...


READERS: dict[str, Callable[[DataConfig, Checker], PromptSource]] = {
    "jsonl": functools.partial(read_text, kind="jsonl"),
    "csv": functools.partial(read_text, kind="csv"),
    "images": functools.partial(read_text, kind="images"),
    "parquet": read_parquet,
    "tfds": read_tfds,
    "array_record": read_tfds,
}


def source_kind(config: DataConfig) -> str:
    """The reader of a source: `source`, but where that is the default, what the path shows itself to be.

    A folder of parquet files, a prepared TFDS folder, a folder of images, a ``.csv``, ``.tsv`` or ``.parquet`` file.
    """
    path = Path(config.path)
    if config.source != "jsonl":
        return config.source
    if path.is_dir():
        if (path / "dataset_info.json").is_file():
            return "tfds"
        return "parquet" if tables.shards(path) else "images"
    return {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(path.suffix.lower(), "jsonl")


def read_prompts(
    config: DataConfig, *, require_image: bool = False, problems: list[UserError] | None = None
) -> PromptSource:
    """Opens and checks a source of prompts; images are not decoded.

    Args:
        config: ``source`` is one of ``jsonl`` (also a JSON array), ``csv`` (also TSV), ``images`` (a folder of them),
            ``parquet`` (a file or a folder), ``tfds`` (a prepared folder, ``NAME/CONFIG`` of a registered builder, or
            ``package.module:NAME/CONFIG``) and ``array_record`` (a prepared TFDS folder); see also `source_kind`.
            ``limit`` stops reading early. With ``on_bad_row: skip`` bad rows are left out and counted in `notes`;
            then the headers of all images are read too.
        require_image: A row without an image is bad.
        problems: Where given, bad rows are left out and their errors appended here; else the first is raised.

    Raises:
        UserError: an unknown source, a missing or damaged file, no rows at all, or a bad row.
    """
    check_values(config, "data")
    if not config.path:
        raise UserError("data.path is empty", where="data", remedy="name a file, a folder or a builder")
    rules = RowRules(require_image=require_image, exif=config.exif, instruction=config.instruction)
    source = READERS[source_kind(config)](config, Checker(config, rules, problems))
    if not len(source) and not problems:
        raise UserError(
            "; ".join(["no rows", *source.notes]), where=config.path, remedy="check data.path and data.split"
        )
    return source


def fingerprint(source: PromptSource) -> str:
    """A hash (hex) of the prompts and their images, for the manifest.

    Independent of where the files lie; image files count by their content.
    """
    digest = ""
    for part in source.content():
        digest = tables.content_hash(digest, part)
    return digest
