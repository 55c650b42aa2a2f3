"""Rows of text files and folders: JSON lines, JSON arrays, CSV, TSV, and folders of images."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from m3po_jax.config import DataConfig
from m3po_jax.data import tables
from m3po_jax.data.checker import Checker
from m3po_jax.data.image_kinds import UNREAD_SUFFIXES
from m3po_jax.data.json_array import array_items
from m3po_jax.data.prompt_list import PromptList
from m3po_jax.errors import UserError

# Of the formats that `images` decodes.
_SUFFIXES = ".avif .bmp .gif .jfif .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
_MAX_CELL = 1 << 28  # characters; a cell may be an image in base64
_JSON_CELLS = ("images", "image", "conversations", "messages", "prompt", "history")
# How files begin that are no text, and what to do with them.
_BINARY = (
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"BZh", "a bzip2 archive", "unpack it first"),
    (b"\xfd7zXZ", "an xz archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first"),
    (b"PAR1", "a parquet file", "set data.source=parquet"),
)

Rows = Iterator[tuple[str, Mapping[str, Any]]]  # where and fields of each row


def _beginning(path: Path) -> bytes:
    """The first bytes of a text file, its byte order mark left out.

    Raises:
        UserError: no such file, or one that is no text.
    """
    if not path.is_file():
        raise UserError("no such file", where=str(path), remedy="check data.path")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
    for signature, kind, remedy in _BINARY:
        if start.startswith(signature):
            raise UserError(f"the file is {kind}", where=str(path), remedy=remedy)
    return start.removeprefix(b"\xef\xbb\xbf")


def json_rows(path: Path, report: Callable[[UserError], None]) -> Rows:
    """Objects of a JSON-lines file, or of a JSON array (LLaVA's files); `report` gets what is no object."""
    if _beginning(path).lstrip()[:1] == b"[":
        with path.open(encoding="utf-8-sig") as text:
            for index, row in enumerate(array_items(text, str(path))):
                if isinstance(row, dict):
                    yield f"{path}[{index}]", row
                else:
                    report(UserError("not a JSON object", where=f"{path}[{index}]"))
        return
    for where, line in tables.json_lines(path):
        try:
            row = tables.parse_json_object(line, where)
        except UserError as error:
            report(error)
        else:
            yield where, row


def _csv_rows(path: Path, report: Callable[[UserError], None]) -> Rows:
    """Rows of a table with a header; empty cells are absent, and lists are written as JSON."""
    _beginning(path)
    csv.field_size_limit(_MAX_CELL)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise UserError("two columns have the same name", where=str(path), remedy="rename one")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row:
                    report(UserError("the row has more cells than the header", where=where))
                    continue
                yield where, {name: _cell(name, text) for name, text in row.items() if text}
    except UnicodeDecodeError:
        raise UserError("not UTF-8", where=str(path), remedy="save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"malformed CSV ({error})", where=str(path), remedy="quote cells as RFC 4180 does") from None


def _cell(name: str, text: str) -> Any:
    if name in _JSON_CELLS and text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _folder_rows(path: Path, instruction: str, unread: Counter[str]) -> Rows:
    """Every image below a folder, by its path there; each is asked the instruction.

    Args:
        unread: Gets the number of pictures of other kinds, by suffix.

    Raises:
        UserError: no instruction.
    """
    if not instruction:
        raise UserError(
            "a folder of images has no instructions",
            where=f"data.path {str(path)!r}",
            remedy="say in data.instruction what is asked about each image",
        )
    files = [file.relative_to(path) for file in path.rglob("*") if not file.is_dir()]
    names = [name for name in files if not any(part.startswith(".") for part in name.parts)]
    unread.update(name.suffix.lower() for name in names if name.suffix.lower() in UNREAD_SUFFIXES)
    for name in sorted(name.as_posix() for name in names if name.suffix.lower() in _SUFFIXES.split()):
        yield str(path / name), {"id": name, "image": name}


def read_text(config: DataConfig, checker: Checker, kind: str) -> PromptList:
    """The prompts of a file or folder of `kind`: jsonl, csv or images."""
    path = Path(config.path)
    if kind == "images":
        rows, root = _folder_rows(path, checker.rules.instruction, checker.unread), path
    else:
        rows = (_csv_rows if kind == "csv" else json_rows)(path, checker.report)
        root = Path(config.image_root or path.parent)
    prompts = []
    for where, row in rows:
        place = where.removeprefix(str(path)).strip(":[]")
        prompt = checker.prompt(row, where, place, root)
        if prompt is not None:
            prompts.append(prompt)
            if len(prompts) == config.limit:
                break
    return PromptList(prompts, root, notes=checker.notes(config.path))
