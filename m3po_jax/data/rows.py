"""One object of a data file to one prompt: the field names of this project, of LLaVA and of VQA sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from m3po_jax.data import schema, tables
from m3po_jax.data.templates import IMAGE_PLACEHOLDER
from m3po_jax.errors import UserError

# Other names of the same field, first found wins: LLaVA's question files, RLAIF-V, VQA sets.
_ID_KEYS = ("id", "question_id", "idx")
IMAGE_KEYS = ("images", "image")
_INSTRUCTION_KEYS = ("instruction", "question")
_REFERENCE_KEYS = ("reference", "answer")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def prompt_from_row(row: Mapping[str, Any], where: str, *, require_image: bool = False) -> schema.Prompt:
    """A prompt from one object of a file.

    Fields: `id`; `images` or `image` (paths, or structs of `bytes` and `path`); `instruction` or `question`,
    or LLaVA's `conversations` (all turns but the last become the history); optional `reference` or `answer`,
    `history`, `metadata`. `text` is the reference, or the question of LLaVA's question files, where no other
    field is. All other fields are kept in the metadata.

    Raises:
        UserError: a field is missing, empty or of the wrong type.
    """
    identifier = _first(row, _ID_KEYS)
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)) or identifier == "":
        raise UserError("the row has no id", where=where, remedy="give each row a unique 'id'")
    where = f"{where} (id {str(identifier)!r})"
    images = parse_images(_first(row, IMAGE_KEYS), where)
    if require_image and not images:
        raise UserError("the row has no image", where=where, remedy="add 'image' or drop the row")
    history = _history(row.get("history"), where)
    instruction, reference = _first(row, _INSTRUCTION_KEYS), _first(row, _REFERENCE_KEYS)
    if row.get("conversations") is not None:
        history, instruction, spoken = _conversation(row["conversations"], len(images), where)
        reference = spoken if reference is None else reference
    elif instruction is None:
        instruction = row.get("text")
    elif reference is None:
        reference = row.get("text")
    if instruction is None:
        raise UserError("the row has no instruction", where=where, remedy="add 'instruction'")
    if not isinstance(instruction, str):
        raise UserError("the instruction is not a text", where=where)
    if not instruction.replace(IMAGE_PLACEHOLDER, "").strip():
        raise UserError("the instruction is empty", where=where, remedy="give one or drop the row")
    if reference is not None and not isinstance(reference, str):
        raise UserError("the reference is not a text", where=where)
    known = {
        *_ID_KEYS,
        *IMAGE_KEYS,
        *_INSTRUCTION_KEYS,
        *_REFERENCE_KEYS,
        "text",
        "conversations",
        "history",
    }
    metadata = {
        key: value
        for key, value in row.items()
        if key not in known | {"metadata"} and value is not None and _is_json(value)
    }
    metadata |= _metadata(row.get("metadata"), where)
    if history:
        metadata["history"] = [list(turn) for turn in history]
    return schema.Prompt(str(identifier), images, instruction, reference, metadata, where)


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def parse_images(value: Any, where: str) -> tuple[schema.Image, ...]:
    if value is None or value == "":
        return ()
    items = value if isinstance(value, (list, tuple)) else [value]
    images = []
    for item in items:
        if isinstance(item, str) and item:
            images.append(schema.Image(path=item))
        elif isinstance(item, bytes) and item:
            images.append(schema.Image(bytes=item))
        elif isinstance(item, Mapping) and (isinstance(item.get("bytes"), bytes) or item.get("path")):
            data, path = item.get("bytes"), item.get("path")
            images.append(schema.Image(data if isinstance(data, bytes) else None, str(path) if path else None))
        else:
            raise UserError("an image is neither a path nor encoded bytes", where=where)
    return tuple(images)


def _history(value: Any, where: str) -> list[tuple[str, str]]:
    turns = value or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    ):
        raise UserError("history is not a list of [user, assistant] texts", where=where)
    return [(user, assistant) for user, assistant in turns]


def _conversation(turns: Any, images: int, where: str) -> tuple[list[tuple[str, str]], str, str | None]:
    """History, last instruction and last answer of LLaVA's `conversations`."""
    said: list[str] = []
    for index, turn in enumerate(turns if isinstance(turns, list) else ()):
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None
        if role != ("user", "assistant")[index % 2] or not isinstance(turn.get("value"), str):
            raise UserError(
                f"turn {index + 1} of the conversation is malformed",
                where=where,
                remedy="human and gpt take turns, each with 'from' and 'value'",
            )
        said.append(turn["value"])
    if not said:
        raise UserError("the conversation is empty", where=where)
    if images == 1 and sum(text.count(IMAGE_PLACEHOLDER) for text in said[::2]) == 1:
        # LLaVA's training code moves the only image in front, wherever the row has it.
        said[0::2] = [text.replace(IMAGE_PLACEHOLDER, "").strip() for text in said[0::2]]
    answered = len(said) % 2 == 0
    last = len(said) - (2 if answered else 1)
    history = list(zip(said[0:last:2], said[1:last:2], strict=True))
    return history, said[last], said[-1] if answered else None


def _metadata(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str) and value:
        value = tables.parse_json_object(value, f"{where} metadata")
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise UserError("metadata is not an object", where=where)
    if not _is_json(value):
        raise UserError("metadata cannot be written as JSON", where=where, remedy="numbers must be finite")
    return dict(value)


def _is_json(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (str, int, bool))
