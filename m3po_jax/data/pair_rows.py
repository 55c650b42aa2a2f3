"""Rows of a pairs table: what they say, and the prompt that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from m3po_jax.data.schema import Image, Prompt


class TableRows(Sequence[dict[str, Any]]):
    """The rows of an Arrow table as dicts, converted one by one when they are read."""

    def __init__(self, table: pa.Table):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def without_images(self) -> Iterator[dict[str, Any]]:
        """All rows but for their images: a pass over the texts need not copy encoded images."""
        names = [name for name in self.table.column_names if name != "images"]
        for chunk in self.table.select(names).to_batches(max_chunksize=256):
            yield from chunk.to_pylist()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.table.slice(range(len(self))[index], 1).to_pylist()[0]


def message_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of one message list in TRL's vision format (or with plain string contents)."""
    parts = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            parts.append(content)
        else:
            parts += [part["text"] for part in content if part["type"] == "text" and part["text"] is not None]
    return "".join(parts)


def pair_prompt(row: Mapping[str, Any], where: str = "") -> Prompt:
    """The prompt of a PAIR row: its images, the last user message and the turns before it."""
    *earlier, last = row["prompt"]
    turns = [message_text([message]) for message in earlier]
    history = [[user, assistant] for user, assistant in zip(turns[::2], turns[1::2], strict=True)]
    images = tuple(Image(bytes=image.get("bytes"), path=image.get("path")) for image in row.get("images") or ())
    return Prompt(
        id=row["id"],
        images=images,
        instruction=message_text([last]),
        metadata={"history": history} if history else {},
        where=where,
    )
