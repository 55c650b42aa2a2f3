"""Preference pairs of every published shape from JSON lines, a JSON array, parquet or a folder of parquet shards."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from m3po_jax.data import parquet_bounds, tables
from m3po_jax.data.image_spool import ImageSpool
from m3po_jax.data.images import read_encoded
from m3po_jax.data.pair_rows import TableRows
from m3po_jax.data.preference_messages import check_images, to_messages
from m3po_jax.data.preference_shapes import images_of, shape_of
from m3po_jax.data.schema import PAIR, Image, message
from m3po_jax.data.text_sources import json_rows
from m3po_jax.errors import UserError

_ID_KEYS = ("id", "question_id", "idx")
_RECORDED = ("chosen_token_ids", "rejected_token_ids", "reference_chosen_logprobs", "reference_rejected_logprobs")
_TEXTS = pa.schema(
    [
        *(PAIR.field(name) for name in ("id", "prompt", "chosen", "rejected", *_RECORDED)),
        pa.field("where", pa.string(), nullable=False),
    ]
)
_ROWS_AT_ONCE = 1024


class FilePairs(TableRows):
    """The pairs of a file: texts in memory, images on disk until their row is asked for.

    Attributes:
        path: As the user wrote it.
        image_root: Folder that image paths are relative to.
        shapes: How many pairs came in which shape.
        undecided: Rows without a preference, which give no pair (ties of VLFeedback).
    """

    def __init__(
        self,
        table: pa.Table,
        images: Sequence[tuple[Image | str, ...]],
        spool: ImageSpool,
        *,
        path: str,
        image_root: Path,
        shapes: Mapping[str, int],
        undecided: int,
    ):
        super().__init__(table)
        self._images, self._spool = images, spool
        self.path, self.image_root, self.shapes, self.undecided = path, image_root, shapes, undecided

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        if isinstance(index, slice):
            return row
        images = self._images[range(len(self))[index]]
        return row | {"images": [self._shown(image) for image in images]}

    def _shown(self, image: Image | str) -> dict[str, Any]:
        if isinstance(image, str):
            return {"bytes": self._spool.get(image), "path": None}
        if image.exif == "ignore":  # as the bytes of such an image are kept: without their orientation
            return {"bytes": read_encoded(image, root=self.image_root, where=self.path), "path": image.path}
        return {"bytes": None, "path": image.path}

    def take(self, numbers: Sequence[int]) -> FilePairs:
        return FilePairs(
            self.table.take(pa.array(numbers, pa.int64())),
            [self._images[number] for number in numbers],
            self._spool,
            path=self.path,
            image_root=self.image_root,
            shapes=self.shapes,
            undecided=self.undecided,
        )

    def summary_line(self) -> str:
        """What was read, in a line."""
        shapes = ", ".join(f"{count} of the shape {name}" for name, count in self.shapes.items())
        undecided = f", {self.undecided} rows without a preference left out" if self.undecided else ""
        return f"{len(self)} pairs from {self.path}: {shapes}{undecided}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all texts, recorded tokens and images, wherever the files lie.

        Raises:
            UserError: an image file that cannot be read.
        """
        digest = hashlib.sha256()
        for row, images in zip(self.without_images(), self._images, strict=True):
            where = row.pop("where")
            keys = [image if isinstance(image, str) else self._key(image, where) for image in images]
            digest.update(tables.content_hash(row, keys).encode())
        return digest.hexdigest()

    def _key(self, image: Image, where: str) -> str:
        return hashlib.sha256(read_encoded(image, root=self.image_root, where=where)).hexdigest()


def image_folder(path: str, image_root: str = "") -> Path:
    """The folder that image paths of a file (or folder) of pairs are relative to."""
    place = Path(path)
    return Path(image_root) if image_root else (place if place.is_dir() else place.parent)


def _kept(image: Image, spool: ImageSpool, roots: tuple[Path, Path], where: str) -> Image | str:
    """An image of a row: its key in the spool where the row holds its bytes, else its path."""
    if image.bytes is None:
        return _under(image, *roots)
    return spool.add(read_encoded(image, root=roots[1], where=where))


def _under(image: Image, folder: Path, root: Path) -> Image:
    """An image whose path climbs out of the file's folder (``../``), by its path under `root` where it lies there."""
    path = Path(image.path or "")
    if ".." in path.parts and not path.is_absolute():
        try:
            place = (folder / path).resolve()
            if place.is_relative_to(root.resolve()):
                return Image(path=str(place.relative_to(root.resolve())), exif=image.exif)
        except (OSError, ValueError, RuntimeError):  # null bytes, symlink loops: told when the image is read
            pass
    return image


def read_preferences(
    path: str, *, image_root: str = "", exif: str = "apply", problems: list[UserError] | None = None
) -> FilePairs:
    """Reads preference pairs of any shape in `preference_shapes.SHAPES`; images are neither decoded nor looked up.

    Args:
        path: JSON lines, a JSON array, a parquet file, or a folder of parquet shards (of the split ``train``, where
            they are named by split).
        image_root: Folder that image paths are relative to; default: that of the file.
        exif: See `schema.Image`.
        problems: Where given, bad rows are left out and their errors appended here; else the first is raised.

    Raises:
        UserError: nothing there, no pair at all, or a bad row, named by file and row.
    """
    spool, shapes, undecided = ImageSpool(), Counter[str](), 0
    roots = image_folder(path), image_folder(path, image_root)
    texts: list[dict[str, Any]] = []
    parts: list[pa.Table] = []
    images: list[tuple[Image | str, ...]] = []

    def report(error: UserError) -> None:
        if problems is None:
            raise error
        problems.append(error)

    for number, (where, row) in enumerate(_rows(Path(path), report)):
        try:
            place = f"{where} (id {_named(row)!r})" if _named(row) else where
            read = _pair(row, place, number)
        except UserError as error:
            report(error)
            continue
        if read is None:
            undecided += 1
            continue
        name, text, shown = read
        shapes[name] += 1
        texts.append(text | {"where": where})
        images.append(tuple(_kept(dataclasses.replace(image, exif=exif), spool, roots, where) for image in shown))
        if len(texts) == _ROWS_AT_ONCE:
            parts.append(tables.to_table(texts, _TEXTS))
            texts.clear()
    parts.append(tables.to_table(texts, _TEXTS))
    if not images and not problems:
        raise UserError(
            f"no pair (of {undecided} rows without a preference)" if undecided else "no pair",
            where=path,
            remedy="name a file of preference pairs",
        )
    return FilePairs(
        pa.concat_tables(parts),
        images,
        spool,
        path=path,
        image_root=image_folder(path, image_root),
        shapes=dict(shapes),
        undecided=undecided,
    )


def _pair(row: Mapping[str, Any], place: str, number: int) -> tuple[str, dict[str, Any], tuple[Image, ...]] | None:
    """(shape, texts, images) of a row; None where it prefers nothing."""
    try:
        shape = shape_of(row)
        preference = shape.read(row)
        if preference is None:
            return None
        images = images_of(row)
        if shape.needs_image and not images:
            raise UserError("the row has no image", remedy="add `image` or drop the row")
        check_images(preference.prompt, len(images))
        text = {
            "id": _named(row) or f"pair-{number}",
            "prompt": to_messages(preference.prompt, len(images)),
            "chosen": message("assistant", preference.chosen),
            "rejected": message("assistant", preference.rejected),
            **_recorded(row),
        }
    except UserError as error:
        raise UserError(error.what, where=place, remedy=error.remedy) from None
    return shape.name, text, images


def _named(row: Mapping[str, Any]) -> str:
    """The row's own id; empty where it has none."""
    value = next((row[key] for key in _ID_KEYS if row.get(key) is not None), "")
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value).encode("utf-8", "replace").decode()
    return ""


def _recorded(row: Mapping[str, Any]) -> dict[str, list[Any] | None]:
    """Tokens and log-probs that m3po recorded at generation, where the row has them.

    Raises:
        UserError: they are no numbers.
    """
    recorded = {name: row.get(name) for name in _RECORDED}
    for name, values in recorded.items():
        kind = int if name.endswith("ids") else (int, float)
        if values is not None and not (
            isinstance(values, (list, tuple))
            and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
            and (kind is not int or all(0 <= value < 2**31 for value in values))
        ):
            raise UserError(f"`{name}` is not a list of numbers", remedy="drop the field")
    return recorded


def _rows(path: Path, report: Callable[[UserError], None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of every row of a file, or of a folder of parquet shards.

    Raises:
        UserError: nothing there, or no file of a kind that is read.
    """
    if path.is_dir():
        for shard in _shards(path):
            yield from _parquet_rows(shard, report)
        return
    if not path.is_file():
        raise UserError("no such file", where=str(path), remedy="name a file of preference pairs")
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    yield from _parquet_rows(path, report) if is_parquet or path.suffix == ".parquet" else json_rows(path, report)


def _shards(folder: Path) -> list[Path]:
    """The parquet files of a folder: those of the split ``train``, or of its only split, where they are so named."""
    files = tables.shards(folder)
    if not files:
        raise UserError("no parquet file in the folder", where=str(folder), remedy="name the file of pairs itself")
    splits: dict[str, list[Path]] = {}
    for file in files:
        name, dash, _ = file.stem.partition("-0") if "-of-" in file.stem else ("", "", "")
        splits.setdefault(name if dash else "", []).append(file)
    if len(splits) == 1 or "" in splits:
        return files
    if "train" not in splits:
        raise UserError(
            f"files of several splits ({', '.join(sorted(splits))}) and none of train",
            where=str(folder),
            remedy="name the file of pairs itself",
        )
    return splits["train"]


def _parquet_rows(path: Path, report: Callable[[UserError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    position = 0
    with tables.open_parquet(path) as opened, tables.damaged(path):
        names = opened.schema_arrow.names
        for group in range(opened.num_row_groups):
            for batch in parquet_bounds.batches(opened, group, names, str(path), rows=64):
                for row in tables.python_rows(batch):
                    if isinstance(row, str):
                        report(UserError(row, where=f"{path}:row {position}", remedy="mend the row"))
                    else:
                        yield f"{path}:row {position}", row
                    position += 1
