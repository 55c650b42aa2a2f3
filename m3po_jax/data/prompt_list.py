"""Prompts in memory whose images are elsewhere, and what identifies them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m3po_jax.data import schema, tables


class PromptList(Sequence[schema.Prompt]):
    """Prompts in memory; images are on disk, see `schema.StoredImage`.

    Attributes:
        image_root: Folder that image paths are relative to.
        notes: What was done to the rows when they were read, a line each.
    """

    def __init__(self, prompts: Sequence[schema.Prompt], image_root: Path, notes: Sequence[str] = ()):
        self._prompts = list(prompts)
        self.image_root = image_root
        self.notes = list(notes)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        return self._prompts[index]

    def content(self) -> Iterator[Any]:
        """Every row, and the content of every image, wherever it lies."""
        return rows_content(self._prompts, self.image_root)


def rows_content(prompts: Iterable[schema.Prompt], root: Path) -> Iterator[Any]:
    """What identifies rows: their fields, and their images' contents, however they are stored."""
    prompts = list(prompts)
    hashes = image_file_hashes(prompts, root)
    for prompt in prompts:
        for image in (stored.read() for stored in prompt.images):
            path, data = image.path, image.bytes
            yield path
            if image.exif != "apply":
                yield {"exif": image.exif}
            if data is not None:
                yield data
            elif path:
                yield hashes[path]
        row = schema.prompt_to_row(dataclasses.replace(prompt, images=()))
        yield {name: value for name, value in row.items() if name != "images"}


def image_file_hashes(prompts: Iterable[schema.Prompt], root: Path) -> dict[str, str | None]:
    """SHA-256 of every image file by its path; None for one that is not there, or not under `root`.

    By content: an image that another one of the same size has replaced is another image. Each file is read once, by
    threads.
    """
    paths = list(dict.fromkeys(i.path for p in prompts for i in p.images if i.path and i.bytes is None))
    root = root.resolve()

    def hashed(name: str) -> str | None:
        try:
            path = (root / name).resolve()
            inside = path.is_relative_to(root) and path.is_file()  # no device, no file of somebody else
            return tables.file_hash(path) if inside else None
        except (OSError, ValueError, RuntimeError):
            return None

    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as threads:
        return dict(zip(paths, threads.map(hashed, paths), strict=True))
