"""Conversations in files of preferences: message lists of TRL, ms-swift and LLaMA-Factory as turns, each checked.

Whatever is wrong raises a `UserError` without a place: the reader of the file knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3po_jax.data.pair_rows import text_part
from m3po_jax.data.schema import IMAGE_PART
from m3po_jax.data.templates import IMAGE_PLACEHOLDER, Marker
from m3po_jax.errors import UserError

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_PAYLOADS = ("image", "image_url", "url", "path", "bytes", "base64")


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        parts: Texts, and `Marker.IMAGE` for image parts.
        plain: The content is a string: it has no image parts, so images may be put in front of it.
    """

    role: str
    parts: tuple[str | Marker, ...]
    plain: bool = True

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def image_parts(self) -> int:
        return self.parts.count(Marker.IMAGE)

    def same_words(self, other: Turn) -> bool:
        """Whether both say the same: a repeated conversation need not repeat its images."""

        def words(turn: Turn) -> str:
            return turn.text.replace(IMAGE_PLACEHOLDER, "").strip()

        return self.role == other.role and words(self) == words(other)


def user(text: str) -> Turn:
    return Turn("user", (text,))


def parse_turns(value: Any, name: str) -> list[Turn]:
    """The turns of a message list ``[{role, content}]`` or ``[{from, value}]``, or of one message.

    An empty system turn in front is none.

    Raises:
        UserError: not messages, an unknown role, content that is missing or of a kind that is not read.
    """
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, (list, tuple)) or not items:
        raise UserError(f"`{name}` is not a list of messages")
    turns = [_turn(item, f"message {number} of `{name}`") for number, item in enumerate(items, 1)]
    if turns[0].role == "system" and not turns[0].text.strip() and not turns[0].image_parts:
        turns = turns[1:]
    if not turns:
        raise UserError(f"`{name}` has no turn of the user or the assistant")
    return turns


def _turn(message: Any, name: str) -> Turn:
    if not isinstance(message, Mapping):
        raise UserError(f"{name} is not an object with `role` and `content`")
    said = message.get("role") if message.get("role") is not None else message.get("from")
    if said not in ROLES:
        raise UserError(f"{name} has the role {str(said)[:40]!r}", remedy=f"read are {', '.join(ROLES)}")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if isinstance(content, str):
        return Turn(ROLES[said], (checked_text(content, name),))
    if not isinstance(content, (list, tuple)) or not content:
        raise UserError(f"{name} has no content", remedy="give its text, or drop the row")
    return Turn(ROLES[said], tuple(_part(part, name) for part in content), plain=False)


def _part(part: Any, name: str) -> str | Marker:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return checked_text(part["text"], name)
    if kind == "image":
        if any(part.get(key) is not None for key in _PAYLOADS):
            raise UserError(f"{name} holds an image itself", remedy="put it into `images`, in the order of the parts")
        return Marker.IMAGE
    instead = "a text part without text" if kind == "text" else f"a part of type {str(kind)[:40]!r}"
    raise UserError(f"{name} has {instead}", remedy='parts are {"type": "image"} and {"type": "text", "text": ...}')


def checked_text(text: Any, name: str) -> str:
    """`text`, where it is one that can be written.

    Raises:
        UserError: not a text, or one with half a surrogate pair (a broken JSON escape).
    """
    if not isinstance(text, str):
        raise UserError(f"{name} is not a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} holds half a character (a lone surrogate)", remedy="mend its \\u escape") from None
    return text


def with_system(turns: Sequence[Turn], system: Any) -> list[Turn]:
    """The turns behind the system turn of a `system` column.

    Raises:
        UserError: they have another one.
    """
    if system is None or system == "":
        return list(turns)
    turn = Turn("system", (checked_text(system, "`system`"),))
    if turns and turns[0].role == "system":
        if not turns[0].same_words(turn):
            raise UserError("the row has two system turns: `system`, and one in its messages", remedy="keep one")
        return list(turns)
    return [turn, *turns]


def check_prompt(turns: Sequence[Turn]) -> None:
    """
    Raises:
        UserError: the turns are not [system,] user, assistant, ..., user, each with something in it.
    """
    said = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in said]
    if "system" in roles:
        raise UserError("a system turn that is not the first message", remedy="put it in front, once")
    if roles and roles[-1] == "assistant":
        raise UserError(
            "the prompt ends with the assistant's turn",
            remedy="end it with the user's: what is learned are the whole answers in `chosen` and `rejected`",
        )
    if len(roles) % 2 == 0 or any(role != ("user", "assistant")[place % 2] for place, role in enumerate(roles)):
        raise UserError(
            f"the turns of the prompt are {', '.join(roles) or 'none'}", remedy="user and assistant take turns"
        )
    for turn in turns:
        if turn.image_parts and turn.role != "user":
            raise UserError(f"an image in a turn of the {turn.role}", remedy="images belong to what the user says")
        if not turn.text.strip() and not turn.image_parts:
            raise UserError(f"an empty turn of the {turn.role}", remedy="give its text, or drop the row")
    if not said[-1].text.replace(IMAGE_PLACEHOLDER, "").strip():
        raise UserError("the instruction is empty", remedy="give one, or drop the row")


def check_images(turns: Sequence[Turn], images: int) -> None:
    """Image parts, or ``<image>`` in the user's words, must be as many as the images.

    Without either, images go in front of the first user's text if that is a plain string, as TRL puts them there.

    Raises:
        UserError: they do not agree.
    """
    said = [turn for turn in turns if turn.role == "user"]
    parts = sum(turn.image_parts for turn in said)
    tags = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in said)
    if parts + tags == images or (parts + tags == 0 and said[0].plain):
        return
    spoken = [f"{parts} image parts"] * bool(parts or not tags) + [f"{tags} {IMAGE_PLACEHOLDER} tags"] * bool(tags)
    raise UserError(
        f"the prompt has {' and '.join(spoken)} for {images} images",
        remedy="one part (or tag) for each of `images`, or drop the row",
    )


def answer_text(value: Any, name: str, prompt: Sequence[Turn]) -> str:
    """The assistant's answer in `chosen` or `rejected`: a text, a message, or messages that may repeat the prompt.

    Raises:
        UserError: it repeats another prompt, or is not one answer of the assistant.
    """
    if isinstance(value, str):
        return _said(checked_text(value, f"`{name}`"), name)
    turns = parse_turns(value, name)
    if turns[0].role != "assistant":
        without_system = [turn for turn in prompt if turn.role != "system"]
        repeated = list(prompt) if turns[0].role == "system" else without_system
        opening = turns[: len(repeated)]
        if len(opening) < len(repeated) or not all(map(Turn.same_words, opening, repeated)):
            raise UserError(
                f"`{name}` repeats another conversation than the prompt",
                remedy="both answers of a pair follow one prompt: drop the row, or leave the answers alone",
            )
        turns = turns[len(repeated) :]
    roles = [turn.role for turn in turns]
    if roles != ["assistant"] or turns[0].image_parts:
        raise UserError(
            f"`{name}` is not one answer of the assistant ({', '.join(roles) or 'no message'} after the prompt)",
            remedy="put earlier turns into the prompt",
        )
    return _said(turns[0].text, name)


def _said(text: str, name: str) -> str:
    if not text.strip():
        raise UserError(f"`{name}` is empty", remedy="drop the row")
    return text


def shared_prompt(chosen: Any, rejected: Any) -> list[Turn]:
    """The prompt that two conversations share: all turns but their last, which are the answers.

    Raises:
        UserError: the conversations differ before their last turns, or have no turn before it.
    """
    ours, theirs = parse_turns(chosen, "chosen"), parse_turns(rejected, "rejected")
    if len(ours) < 2 or len(theirs) < 2:
        raise UserError(
            "no prompt: `chosen` and `rejected` hold the answers alone",
            remedy="add `prompt`, or the turns before them",
        )
    if len(ours) != len(theirs) or ours[:-1] != theirs[:-1]:
        raise UserError(
            "`chosen` and `rejected` are conversations that differ before their last turn",
            remedy="both answers of a pair follow one prompt: drop the row",
        )
    return ours[:-1]


def to_messages(turns: Sequence[Turn], images: int) -> list[dict[str, Any]]:
    """The turns as messages of a PAIR row, with a part for every image.

    ``<image>`` in the user's words stays there (`pair_rows.pair_prompt` reads it so).
    """
    users = [turn for turn in turns if turn.role == "user"]
    placed = any(turn.image_parts or IMAGE_PLACEHOLDER in turn.text for turn in users)
    messages = []
    for turn in turns:
        content = [IMAGE_PART if part is Marker.IMAGE else text_part(str(part)) for part in turn.parts]
        if turn is users[0] and not placed:
            content = [IMAGE_PART for _ in range(images)] + content
        messages.append({"role": turn.role, "content": content})
    return messages
