"""One object of a data file to one prompt: the field names of this project, of LLaVA, of chats and of VQA sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3po_jax.data import schema, tables
from m3po_jax.data.inline_images import inline_bytes
from m3po_jax.data.row_values import check_id, check_text, json_value
from m3po_jax.data.templates import IMAGE_PLACEHOLDER
from m3po_jax.errors import UserError

# Other names of the same field, first found wins: LLaVA's question files, RLAIF-V, VQA sets, VLMEvalKit.
_ID_KEYS = ("id", "question_id", "idx", "index")
IMAGE_KEYS = ("images", "image")
_INSTRUCTION_KEYS = ("instruction", "question", "prompt")
_REFERENCE_KEYS = ("reference", "answer")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class RowRules:
    """How the rows of one source are read.

    Attributes:
        require_image: Refuse rows without an image.
        exif: See `schema.Image`.
        instruction: Of rows that have none of their own; empty: they are refused.
    """

    require_image: bool = False
    exif: str = "apply"
    instruction: str = ""


@dataclass(frozen=True)
class _Chat:
    """What a conversation says, and the images that stand in its turns."""

    history: list[tuple[str, str]]
    instruction: str
    answer: str | None
    system: str | None
    images: list[Any]


def prompt_from_row(
    row: Mapping[str, Any], where: str, rules: RowRules | None = None, *, place: str | None = None
) -> schema.Prompt:
    """A prompt from one object of a file.

    Fields: `id`; `images` or `image` (paths, data URIs, or structs of `bytes` and `path`); `instruction`, `question`
    or `prompt`, or a chat (`conversations`, `messages` or `prompt` as a list of turns), all turns but the last
    becoming the history; optional `reference` or `answer`, `history`, `system`, `metadata`. `text` is the reference,
    or the question of LLaVA's and POPE's question files, where no other field is; a `label` of yes or no beside such
    a question is its reference. All other fields are kept in the metadata, except bytes.

    Args:
        place: Of the row in its file; where given, it makes the id of a row that has none: its only image's path, or
            ``row-PLACE``.

    Raises:
        UserError: a field is missing, empty, of the wrong type, or of a value that no file of ours can hold.
    """
    rules = rules or RowRules()
    images = parse_images(_first(row, IMAGE_KEYS), where, exif=rules.exif)
    identifier = _identifier(row, images, where, place)
    where = f"{where} (id {identifier!r})"
    history, system = _history(row.get("history"), where), row.get("system")
    instruction, reference = _first(row, _INSTRUCTION_KEYS), _first(row, _REFERENCE_KEYS)
    turns = _turns(row)
    if turns is not None:
        chat = _chat(turns, len(images), where)
        if not images:
            images = parse_images(chat.images, where, exif=rules.exif)
        history, instruction = chat.history, chat.instruction
        reference = chat.answer if reference is None else reference
        system = chat.system if system is None else system
    elif instruction is None:
        instruction = row.get("text") if row.get("text") is not None else rules.instruction or None
        reference = _yes_no_label(row) if reference is None else reference
    elif reference is None:
        reference = row.get("text")
    if rules.require_image and not images:
        raise UserError("the row has no image", where=where, remedy="add 'image' or drop the row")
    if instruction is None:
        raise UserError(
            "the row has no instruction", where=where, remedy="add 'instruction', or set data.instruction"
        )
    if not isinstance(instruction, str):
        raise UserError("the instruction is not a text", where=where)
    if not instruction.replace(IMAGE_PLACEHOLDER, "").strip():
        raise UserError("the instruction is empty", where=where, remedy="give one or drop the row")
    if reference is not None and not isinstance(reference, str):
        raise UserError("the reference is not a text", where=where)
    check_text(instruction, "the instruction", where)
    check_text(reference or "", "the reference", where)
    metadata = _metadata(row, where)
    # What an earlier reading of a row has put there.
    history = history or _history(metadata.get("history"), where)
    system = metadata.get("system") if system is None else system
    if system is not None:
        if not isinstance(system, str):
            raise UserError("the system turn is not a text", where=where)
        metadata["system"] = check_text(system, "the system turn", where)
    if history:
        metadata["history"] = [[check_text(text, "the history", where) for text in turn] for turn in history]
    return schema.Prompt(identifier, images, instruction, reference, metadata, where)


def _yes_no_label(row: Mapping[str, Any]) -> str | None:
    """The right answer of a question as POPE's files have it."""
    label = row.get("label")
    return label if isinstance(label, str) and label.strip().lower() in ("yes", "no") else None


def _turns(row: Mapping[str, Any]) -> Any:
    """The conversation of a row that has one: LLaVA's, or, where no other field is the instruction, a chat."""
    if row.get("conversations") is not None:
        return row["conversations"]
    instruction = _first(row, _INSTRUCTION_KEYS)
    if instruction is None:
        return row.get("messages")
    return row["prompt"] if isinstance(row.get("prompt"), (list, tuple)) and instruction is row["prompt"] else None


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _identifier(row: Mapping[str, Any], images: tuple[schema.Image, ...], where: str, place: str | None) -> str:
    identifier = _first(row, _ID_KEYS)
    if identifier is None and place is not None:
        path = images[0].path if len(images) == 1 else None
        identifier = path or f"row-{place}"
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)) or identifier == "":
        raise UserError("the row has no id", where=where, remedy="give each row a unique 'id'")
    return check_id(str(identifier), where)


def parse_images(value: Any, where: str, *, exif: str = "apply") -> tuple[schema.Image, ...]:
    """Images of a row, which a file has as one or a list of: a path, a data URI or base64, bytes, a struct of these.

    Raises:
        UserError: something else.
    """
    if value is None or value == "":
        return ()
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_image(item, where, exif) for item in items)


def _image(item: Any, where: str, exif: str) -> schema.Image:
    if isinstance(item, str) and item:
        data = inline_bytes(item, where)
        path = None if data is not None else check_text(item, "an image's path", where)
        return schema.Image(data, path, exif)
    if isinstance(item, bytes) and item:
        return schema.Image(item, None, exif)
    if isinstance(item, Mapping):
        data, path = item.get("bytes"), _first(item, ("path", "url"))
        if isinstance(data, str) and data:
            data = inline_bytes(data, where)
        if data is None and isinstance(path, str) and path:
            return _image(path, where, exif)
        if isinstance(data, bytes):
            return schema.Image(
                data, check_text(path, "an image's path", where) if isinstance(path, str) else None, exif
            )
    raise UserError("an image is neither a path nor encoded bytes", where=where, remedy="give one of them")


def _history(value: Any, where: str) -> list[tuple[str, str]]:
    turns = value or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    ):
        raise UserError("history is not a list of [user, assistant] texts", where=where)
    return [(user, assistant) for user, assistant in turns]


def _chat(turns: Any, images: int, where: str) -> _Chat:
    """A conversation of LLaVA (`from`, `value`) or of a chat (`role`, `content`).

    As LLaVA's training code does, a turn of the assistant in front is left out, and the only image of what a user
    says moves to the front of it (`preprocess_multimodal`), with a line break behind it. Where all images then stand
    in front of the first turn, the template puts them there and nothing marks them.
    """
    if not isinstance(turns, (list, tuple)):
        raise UserError("the conversation is not a list of turns", where=where)
    said: list[str] = []
    inside: list[Any] = []
    system: str | None = None
    for index, turn in enumerate(turns):
        role = _ROLES.get(str(_first(turn, ("from", "role")))) if isinstance(turn, Mapping) else None
        text = _turn_text(_first(turn, ("value", "content")), inside) if role is not None else None
        if role == "system" and index == 0 and text is not None:
            system = text
            continue
        if role == "assistant" and not said and text is not None:
            continue
        if role != ("user", "assistant")[len(said) % 2] or text is None:
            raise UserError(
                f"turn {index + 1} of the conversation is malformed",
                where=where,
                remedy="human and gpt (or user and assistant) take turns, each with a text",
            )
        said.append(text)
    if not said:
        raise UserError("the conversation is empty", where=where)
    users = [_image_in_front(text) for text in said[0::2]]
    count = images or len(inside)
    front = f"{IMAGE_PLACEHOLDER}\n" * count
    if sum(text.count(IMAGE_PLACEHOLDER) for text in users) == count and users[0].startswith(front):
        users[0] = users[0][len(front) :]
    said[0::2] = users
    answered = len(said) % 2 == 0
    last = len(said) - (2 if answered else 1)
    history = list(zip(said[0:last:2], said[1:last:2], strict=True))
    return _Chat(history, said[last], said[-1] if answered else None, system, inside)


def _image_in_front(text: str) -> str:
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}"


def _turn_text(content: Any, images: list[Any]) -> str | None:
    """What one turn says, with ``<image>`` for its image parts, whose own images are appended to `images`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        return None
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_PLACEHOLDER)
            image = _first(part, ("image", "image_url", "url", "path"))
            if image is not None:
                images.append(image)
        else:
            return None
    return "".join(texts)


def _is_said(row: Mapping[str, Any], name: str) -> bool:
    """Whether the field `prompt` or `messages` is what the user says."""
    instruction = _first(row, _INSTRUCTION_KEYS)
    return instruction is row.get(name) if name == "prompt" else instruction is None


def _metadata(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The metadata of a row, and its other fields; a binary field is none of them."""
    used = {*_ID_KEYS[:-1], *IMAGE_KEYS, *_INSTRUCTION_KEYS[:-1], *_REFERENCE_KEYS}
    used |= {"text", "conversations", "history", "system", "metadata"}
    # Names that mean something else where the row has a better one.
    used |= {name for name in ("index",) if _first(row, _ID_KEYS) is row.get(name)}
    used |= {name for name in ("prompt", "messages") if row.get("conversations") is None and _is_said(row, name)}
    fields = {
        str(key): json_value(value, f"the field {str(key)!r}", where)
        for key, value in row.items()
        if key not in used and value is not None and not isinstance(value, bytes)
    }
    value = row.get("metadata")
    if isinstance(value, str) and value:
        value = tables.parse_json_object(value, f"{where} metadata")
    if not value:
        return fields
    if not isinstance(value, Mapping):
        raise UserError("metadata is not an object", where=where)
    return fields | json_value(value, "the metadata", where)
