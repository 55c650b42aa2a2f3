"""Prompts of prepared tensorflow-datasets folders, without TensorFlow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3po_jax.config import DataConfig
from m3po_jax.data import schema, tfds_build
from m3po_jax.data.checker import Checker
from m3po_jax.data.prompt_list import PromptList, rows_content
from m3po_jax.data.rows import IMAGE_KEYS, parse_images
from m3po_jax.errors import UserError


class TfdsRows:
    """The rows of a prepared TFDS folder, through its TensorFlow-free data source (ArrayRecord files).

    Args:
        directory: The folder with dataset_info.json.
        split: A split, or a part of one (``train[:100]``).
        exif: See `schema.Image`.
    """

    def __init__(self, directory: Path, split: str, exif: str):
        self.directory, self.split, self.exif = directory, split, exif
        self._source: Any = None

    def source(self) -> Any:
        """The data source beneath; opened anew in every process."""
        if self._source is None:
            import tensorflow_datasets as tfds

            with tfds_build.quiet():
                builder = tfds.builder_from_directory(str(self.directory))

            class Encoded(tfds.decode.SkipDecoding):
                """Gives images as the bytes that are stored; TFDS's own does not know sequences of images."""

                def decode_batch_example_np(self, serialized_examples: Any) -> Any:
                    return serialized_examples

            skip = {key: Encoded() for key in IMAGE_KEYS if key in (builder.info.features or {})}
            self._source = builder.as_data_source(self.split, decoders=skip or None)
        return self._source

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` with texts as `str` and images as encoded bytes."""
        return {
            key: (value if isinstance(value, bytes) else list(value)) if key in IMAGE_KEYS else _decoded(value)
            for key, value in self.source()[index].items()
        }

    def where(self, index: int) -> str:
        """Folder, split and row, for messages."""
        return f"{self.directory}/{self.split}:row {index}"

    def images(self, place: int) -> Sequence[schema.Image]:
        """The images of row `place`, read anew."""
        row = self.row(place)
        value = next((row[key] for key in IMAGE_KEYS if row.get(key) is not None), None)
        return parse_images(value, self.where(place), exif=self.exif)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}


class TfdsSource(PromptList):
    """Prompts of a prepared TFDS folder; no row holds an image's bytes."""

    def content(self) -> Iterator[Any]:
        """Every row, with its encoded images."""
        for prompt in self:
            yield from rows_content([prompt], self.image_root)


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
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__  # TFDS wraps what a builder raises
        if cause is not None:
            raise cause from None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"cannot open the TFDS data set ({type(error).__name__}: {reason})",
            where=f"data.path {config.path!r}",
            remedy="give a prepared folder, NAME/CONFIG, or package.module:NAME/CONFIG",
        ) from None


def read_tfds(config: DataConfig, checker: Checker) -> TfdsSource:
    """The prompts of a prepared folder or a registered builder.

    Raises:
        UserError: there is none, it cannot be built, or its split or files cannot be read.
    """
    rows = TfdsRows(_tfds_folder(config), config.split, checker.rules.exif)
    try:
        count = len(rows.source())
    except Exception as error:  # unknown split, other file format, damaged metadata: all of TFDS's own types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"cannot read split {config.split!r} ({reason})",
            where=str(rows.directory),
            remedy="check data.split; the files must be ArrayRecord",
        ) from None
    prompts = []
    for index in range(count):
        row = rows.row(index)
        try:
            images = len(rows.images(index))
        except UserError as error:
            checker.report(error)
            continue
        stored = tuple(schema.StoredImage(rows, index, number) for number in range(images))
        prompt = checker.prompt(row, rows.where(index), str(index), rows.directory, stored=stored)
        if prompt is not None:
            prompts.append(prompt)
            if len(prompts) == config.limit:
                break
    return TfdsSource(prompts, rows.directory, checker.notes(config.path))
