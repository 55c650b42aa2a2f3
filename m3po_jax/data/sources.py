"""Prompts from files: JSON lines, parquet and TFDS, with random access and without decoding images.

Every source is a sequence of `schema.Prompt` with `__len__` and `__getitem__`, so `grain.MapDataset.source`
takes it as it is. Rows are checked once, when the source is opened; each error names file, row and id.
"""

from __future__ import annotations

import importlib
import json
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from m3po_jax.config import DataConfig
from m3po_jax.data import schema, tables, tfds_build
from m3po_jax.data.rows import IMAGE_KEYS, parse_images, prompt_from_row
from m3po_jax.errors import UserError, nearest


@runtime_checkable
class PromptSource(Protocol):
    """Random access to prompts.

    Attributes:
        image_root: Folder that image paths are relative to.
    """

    image_root: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> schema.Prompt: ...

    def content(self) -> Iterable[Any]:
        """What identifies the content, for `fingerprint`."""
        ...


class _Checker:
    """Collects the problems of a source, or raises the first; refuses ids that came before."""

    def __init__(self, require_image: bool, problems: list[UserError] | None):
        self.require_image, self.problems = require_image, problems
        self.seen: dict[str, str] = {}

    def report(self, error: UserError) -> None:
        if self.problems is None:
            raise error
        self.problems.append(error)

    def prompt(self, row: Mapping[str, Any], where: str) -> schema.Prompt | None:
        try:
            prompt = prompt_from_row(row, where, require_image=self.require_image)
            if prompt.id in self.seen:
                raise UserError(
                    f"the id occurs before, at {self.seen[prompt.id]}",
                    where=prompt.where,
                    remedy="give each row a unique 'id'",
                )
        except UserError as error:
            self.report(error)
            return None
        self.seen[prompt.id] = where
        return prompt


class PromptList(Sequence[schema.Prompt]):
    """Prompts in memory; images stay encoded or on disk."""

    def __init__(self, prompts: Sequence[schema.Prompt], image_root: Path):
        self._prompts = list(prompts)
        self.image_root = image_root

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        return self._prompts[index]

    def content(self) -> Iterator[Any]:
        """Every row; an image file counts by path and size, because a folder may hold terabytes."""
        for prompt in self._prompts:
            yield from _row_content(prompt, self.image_root)


def _row_content(prompt: schema.Prompt, root: Path) -> Iterator[Any]:
    row = schema.prompt_to_row(prompt)
    for image in row.pop("images"):
        yield image["path"]
        if image["bytes"] is not None:
            yield image["bytes"]
        elif image["path"]:
            path = root / image["path"]
            yield path.stat().st_size if path.is_file() else None
    yield row


def json_rows(path: Path, report: Callable[[UserError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of a JSON-lines file, or of a JSON array (LLaVA's files); `report` gets what is no object."""
    if not path.is_file():
        raise UserError("no such file", where=str(path), remedy="check data.path")
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if start == b"[":
            file.seek(0)
            try:
                rows = json.loads(file.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"malformed JSON: {error}", where=str(path)) from None
            for index, row in enumerate(rows):
                if isinstance(row, dict):
                    yield f"{path}[{index}]", row
                else:
                    report(UserError("not a JSON object", where=f"{path}[{index}]"))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = tables.parse_json_object(line, where)
            except UserError as error:
                report(error)
            else:
                yield where, row


def _read_json(config: DataConfig, checker: _Checker) -> PromptList:
    path = Path(config.path)
    prompts = []
    for where, row in json_rows(path, checker.report):
        prompt = checker.prompt(row, where)
        if prompt is not None:
            prompts.append(prompt)
            if len(prompts) == config.limit:
                break
    return PromptList(prompts, Path(config.image_root or path.parent))


class ParquetSource(Sequence[schema.Prompt]):
    """Prompts of parquet files; texts in memory, images read when their row is asked for.

    A few row groups are kept, because shuffled access would otherwise read a whole group for each row.
    """

    _KEPT_GROUPS = 4

    def __init__(self, files: Sequence[Path], image_root: Path, image_column: str | None):
        self.files, self.image_root = list(files), image_root
        self._image_column = image_column
        self._prompts: list[schema.Prompt] = []
        self._places: list[tuple[int, int, int]] = []  # file, row group, row in it
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def add(self, prompt: schema.Prompt, place: tuple[int, int, int]) -> None:
        """Adds a row whose images are empty shells; `place` says where they are."""
        self._prompts.append(prompt)
        self._places.append(place)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        prompt = self._prompts[index]
        if self._image_column is None:
            return prompt
        file, group, row = self._places[index]
        value = self._group(file, group)[row].as_py()
        return schema.Prompt(
            prompt.id,
            parse_images(value, prompt.where),
            prompt.instruction,
            prompt.reference,
            prompt.metadata,
            prompt.where,
        )

    def _group(self, file: int, group: int) -> Any:
        key = (file, group)
        column = self._groups.pop(key, None)
        if column is None:
            with tables.open_parquet(self.files[file]) as opened:
                column = opened.read_row_group(group, columns=[self._image_column]).column(0)
        self._groups[key] = column
        while len(self._groups) > self._KEPT_GROUPS:
            self._groups.popitem(last=False)
        return column

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups": OrderedDict()}

    def content(self) -> Iterator[Any]:
        """The bytes of the files, and which rows are taken."""
        yield [tables.file_hash(path) for path in self.files]
        yield [prompt.id for prompt in self._prompts]


def _read_parquet(config: DataConfig, checker: _Checker) -> ParquetSource:
    path = Path(config.path)
    files = [path] if path.is_file() else _split_files(tables.shards(path), config.split)
    if not files:
        raise UserError("no parquet file", where=str(path), remedy="check data.path and data.split")
    with tables.open_parquet(files[0]) as first:
        names = first.schema_arrow.names
    image_column = next((name for name in IMAGE_KEYS if name in names), None)
    root = Path(config.image_root) if config.image_root else files[0].parent
    source = ParquetSource(files, root, image_column)
    for number, file in enumerate(files):
        with tables.open_parquet(file) as opened:
            if opened.schema_arrow.names != names:
                raise UserError(f"its columns differ from those of {files[0].name}", where=str(file))
            texts = [name for name in names if name != image_column]
            position = 0
            for group in range(opened.num_row_groups):
                counts = _image_counts(opened, group, image_column)
                for row, values in enumerate(opened.read_row_group(group, columns=texts).to_pylist()):
                    position += 1
                    # Shells of the right number: `prompt_from_row` checks and counts, the bytes stay on disk.
                    shells = [{"path": "on disk"}] * counts[row]
                    prompt = checker.prompt(values | {"images": shells}, f"{file}:row {position - 1}")
                    if prompt is not None:
                        source.add(prompt, (number, group, row))
                        if len(source) == config.limit:
                            return source
    return source


def _split_files(files: list[Path], split: str) -> list[Path]:
    """Files named ``SPLIT-00000-of-00001.parquet`` of one split; all files, where none is so named."""
    hub = [file for file in files if "-of-" in file.stem]
    return [file for file in hub if file.name.startswith(f"{split}-")] if hub else files


def _image_counts(opened: Any, group: int, column: str | None) -> list[int]:
    """Images of each row of a row group, without reading their bytes where the column has paths as well."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column is None:
        return [0] * opened.metadata.row_group(group).num_rows
    leaves = [opened.schema.column(i).path for i in range(len(opened.schema))]
    light = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]
    values = opened.read_row_group(group, columns=light or [column]).column(0)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return pc.fill_null(pc.list_value_length(values), 0).to_pylist()
    return [int(valid) for valid in values.is_valid().to_pylist()]


class TfdsSource(Sequence[schema.Prompt]):
    """Prompts of a prepared TFDS folder, through its TensorFlow-free data source (ArrayRecord files).

    Args:
        directory: The folder with dataset_info.json.
        split: A split, or a part of one (``train[:100]``).
    """

    def __init__(self, directory: Path, split: str):
        self.image_root, self._split = directory, split
        self._indices: list[int] = []
        self._rows: Any = None

    def rows(self) -> Any:
        """The data source beneath; opened anew in every process."""
        if self._rows is None:
            import tensorflow_datasets as tfds

            with tfds_build.quiet():
                builder = tfds.builder_from_directory(str(self.image_root))

            class Encoded(tfds.decode.SkipDecoding):
                """Gives images as the bytes that are stored; TFDS's own does not know sequences of images."""

                def decode_batch_example_np(self, serialized_examples: Any) -> Any:
                    return serialized_examples

            skip = {key: Encoded() for key in IMAGE_KEYS if key in (builder.info.features or {})}
            self._rows = builder.as_data_source(self._split, decoders=skip or None)
        return self._rows

    def add(self, index: int) -> None:
        """Takes the row at `index` of `rows`."""
        self._indices.append(index)

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` of `rows` with texts as `str` and images as encoded bytes."""
        row = self.rows()[index]
        return {
            key: (value if isinstance(value, bytes) else list(value)) if key in IMAGE_KEYS else _decoded(value)
            for key, value in row.items()
        }

    def where(self, index: int) -> str:
        """Folder, split and row, for messages."""
        return f"{self.image_root}/{self._split}:row {index}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = self._indices[operator.index(index)]
        return prompt_from_row(self.row(place), self.where(place))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def content(self) -> Iterator[Any]:
        """Every row, with its encoded images."""
        for prompt in self:
            yield from _row_content(prompt, self.image_root)


def _decoded(value: Any) -> Any:
    """TFDS gives texts as bytes and numbers as NumPy scalars."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {key: _decoded(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _decoded(value.tolist())
    return [_decoded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tfds_folder(config: DataConfig) -> Path:
    """The prepared folder that `path` means: itself, or that of a registered builder (built if need be)."""
    path = Path(config.path)
    if path.is_dir():
        if not (path / "dataset_info.json").is_file():
            raise UserError(
                "no dataset_info.json in the folder",
                where=str(path),
                remedy="name the version's folder (NAME/1.0.0)",
            )
        return path
    if config.source == "array_record":
        raise UserError("no such folder", where=str(path), remedy="array_record reads a prepared TFDS folder")
    import tensorflow_datasets as tfds

    module, _, name = config.path.rpartition(":")
    try:
        if module:
            importlib.import_module(module)  # registers its builders
        with tfds_build.quiet():
            builder = tfds.builder(name, try_gcs=False)
        return tfds_build.prepare(builder)
    except Exception as error:  # whatever a builder's own code raises
        own: BaseException | None = error
        while own is not None and not isinstance(own, UserError):
            own = own.__cause__  # TFDS wraps what a builder raises
        if own is not None:
            raise own from None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"cannot open the TFDS data set ({type(error).__name__}: {reason})",
            where=f"data.path {config.path!r}",
            remedy="give a prepared folder, NAME/CONFIG, or package.module:NAME/CONFIG",
        ) from None


def _read_tfds(config: DataConfig, checker: _Checker) -> TfdsSource:
    source = TfdsSource(_tfds_folder(config), config.split)
    try:
        count = len(source.rows())
    except Exception as error:  # unknown split, other file format, damaged metadata: all of TFDS's own types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"cannot read split {config.split!r} ({reason})",
            where=str(source.image_root),
            remedy="check data.split; the files must be ArrayRecord",
        ) from None
    for index in range(count):
        if checker.prompt(source.row(index), source.where(index)) is not None:
            source.add(index)
            if len(source) == config.limit:
                break
    return source


_READERS: dict[str, Callable[[DataConfig, _Checker], PromptSource]] = {
    "jsonl": _read_json,
    "parquet": _read_parquet,
    "tfds": _read_tfds,
    "array_record": _read_tfds,
}


def read_prompts(
    config: DataConfig, *, require_image: bool = False, problems: list[UserError] | None = None
) -> PromptSource:
    """Opens and checks a source of prompts; images are neither read nor decoded.

    Args:
        config: ``source`` is one of ``jsonl`` (also a JSON array), ``parquet`` (a file or a folder), ``tfds``
            (a prepared folder, ``NAME/CONFIG`` of a registered builder, or ``package.module:NAME/CONFIG``)
            and ``array_record`` (a prepared TFDS folder). ``limit`` stops reading early.
        require_image: Refuse rows without an image.
        problems: Where given, bad rows are left out and their errors appended here; else the first is raised.

    Raises:
        UserError: an unknown source, a missing or damaged file, no rows at all, or a bad row.
    """
    if config.source not in _READERS:
        raise UserError(f"unknown source {config.source!r}{nearest(config.source, _READERS)}", where="data.source")
    if not config.path:
        raise UserError("data.path is empty", where="data", remedy="name a file, a folder or a builder")
    if config.limit is not None and config.limit < 1:
        raise UserError(f"data.limit is {config.limit}", where="data", remedy="give a positive number or none")
    source = _READERS[config.source](config, _Checker(require_image, problems))
    if not len(source) and not problems:
        raise UserError("no rows", where=config.path, remedy="check data.path and data.split")
    return source


def fingerprint(source: PromptSource) -> str:
    """A hash (hex) of the prompts and their embedded images, for the manifest.

    Independent of where the files lie. Images in files of their own count by path and size.
    """
    digest = ""
    for part in source.content():
        digest = tables.content_hash(digest, part)
    return digest
