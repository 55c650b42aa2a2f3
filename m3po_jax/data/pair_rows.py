"""Rows of pairs: what they say, and the prompt that they belong to.

The normal form of a pair is that of the PAIR schema, TRL's vision preference format: `images`, and `prompt`, `chosen`
and `rejected` as messages whose content is a list of image and text parts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from m3po_jax.data.schema import IMAGE_PART, Image, Prompt, PromptTokens
from m3po_jax.data.templates import IMAGE_PLACEHOLDER
from m3po_jax.data.tokenised import TokenisedPrompts
from m3po_jax.errors import UserError

_LINE = f"{IMAGE_PLACEHOLDER}\n"  # an image in front of what the user says


class PairRows(Sequence[dict[str, Any]]):
    """Pairs in the normal form, read one by one; a row may have `where`, its place in the user's file."""

    _prompts: TokenisedPrompts | None = None

    def prompts(self, tokenise: Callable[[Prompt], PromptTokens], where: str) -> TokenisedPrompts:
        """The prompts of all rows with their token ids, which are made once for all trainings that ask.

        Args:
            where: The pairs' file, for messages.
        """
        if self._prompts is None:
            self._prompts = TokenisedPrompts(PairPrompts(self, where), tokenise)
        return self._prompts

    @abstractmethod
    def without_images(self) -> Iterator[dict[str, Any]]:
        """All rows but for their images: a pass over the texts need not copy encoded images."""

    @abstractmethod
    def ids(self) -> list[str]:
        """The ids of all rows."""

    @abstractmethod
    def take(self, numbers: Sequence[int]) -> PairRows:
        """The rows of these numbers, in their order."""


class TableRows(PairRows):
    """The rows of an Arrow table as dicts, converted one by one when they are read."""

    def __init__(self, table: pa.Table):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def without_images(self) -> Iterator[dict[str, Any]]:
        names = [name for name in self.table.column_names if name != "images"]
        for chunk in self.table.select(names).to_batches(max_chunksize=256):
            yield from chunk.to_pylist()

    def ids(self) -> list[str]:
        return self.table.column("id").to_pylist()

    def take(self, numbers: Sequence[int]) -> PairRows:
        return TableRows(self.table.take(pa.array(numbers, pa.int64())))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.table.slice(range(len(self))[index], 1).to_pylist()[0]


class PairPrompts(Sequence[Prompt]):
    """The prompts of pairs, each made with its images when it is asked for.

    Args:
        where: The pairs' file, for messages.
    """

    def __init__(self, pairs: Sequence[Mapping[str, Any]], where: str = "pairs"):
        self.pairs, self.where = pairs, where

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, number = self.pairs[index], range(len(self))[index]
        return pair_prompt(row, place_of(row, number, self.where))


def place_of(row: Mapping[str, Any], number: int, source: str = "pairs") -> str:
    """File and row of a pair, for error messages; `number` counts from 0."""
    return f"{row.get('where') or f'{source}:{number + 1}'} (id {row['id']!r})"


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
    """The prompt of a PAIR row: its images, the last user message, the turns before it and the system turn.

    Images stand in front of what the user says in their turn, wherever their parts are in it: so LLaVA was trained,
    and so llava-hf's chat template writes them. Those of the first turn are left to our template; where a later turn
    has some, all become ``<image>`` in their turns. A text may say ``<image>`` itself, to have one elsewhere.

    Raises:
        UserError: the turns are not [system,] user, assistant, ..., user.
    """
    messages = list(row["prompt"])
    system = message_text([messages.pop(0)]) if messages and messages[0]["role"] == "system" else ""
    roles = [message["role"] for message in messages]
    if len(roles) % 2 == 0 or any(role != ("user", "assistant")[place % 2] for place, role in enumerate(roles)):
        raise UserError(
            f"the turns of the prompt are {', '.join(roles) or 'none'}",
            where=where or None,
            remedy="user and assistant take turns, from the user's first to the user's last",
        )
    texts, counts = [message_text([message]) for message in messages], list(map(_image_parts, messages))
    if any(counts[1:]) or any(IMAGE_PLACEHOLDER in text for text in texts[::2]):
        texts = [_LINE * count + text for count, text in zip(counts, texts, strict=True)]
    history = [[user, assistant] for user, assistant in zip(texts[:-1:2], texts[1::2], strict=True)]
    return Prompt(
        id=row["id"],
        images=tuple(Image(bytes=image.get("bytes"), path=image.get("path")) for image in row.get("images") or ()),
        instruction=texts[-1],
        metadata=({"history": history} if history else {}) | ({"system": system} if system else {}),
        where=where,
        tokens=PromptTokens.of_row(row),
    )


def _image_parts(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def prompt_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages of a prompt, from which `pair_prompt` makes one that every template writes as this one.

    Images in front of a turn become image parts; ``<image>`` within a text stays there.
    """
    history = prompt.metadata.get("history") or []
    said = [text for turn in history for text in turn] + [prompt.instruction]
    tagged = any(IMAGE_PLACEHOLDER in text for text in said[::2])
    messages = []
    if system := prompt.metadata.get("system"):
        messages.append({"role": "system", "content": [text_part(system)]})
    for place, text in enumerate(said):
        user = place % 2 == 0
        rest = text.removeprefix(_LINE * _opening_images(text)) if user else text
        count = len(prompt.images) if place == 0 and not tagged else _opening_images(text) * user
        content = [IMAGE_PART] * count + ([text_part(rest)] if rest or not count else [])
        messages.append({"role": "user" if user else "assistant", "content": content})
    return messages


def _opening_images(text: str) -> int:
    """How many images stand in front of a text, each on a line of its own."""
    return 1 + _opening_images(text.removeprefix(_LINE)) if text.startswith(_LINE) else 0


def text_part(text: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": text}
