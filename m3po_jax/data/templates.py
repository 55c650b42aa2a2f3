"""Conversation templates as data: the exact text around an instruction.

A rendered prompt is a tuple of pieces: text, and the markers `IMAGE` and `EOS`. Each text piece is tokenised
alone (LLaVA's split rule) and as ordinary text: nothing that a user or a model wrote can turn into a marker.
Sources: `vicuna_v1` of haotian-liu/LLaVA `conversation.py`; the chat template of llava-hf/llava-1.5-7b-hf.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from m3po_jax.errors import UserError, nearest

IMAGE_PLACEHOLDER = "<image>"
CHAT = "chat"  # the name of the model directory's own template, see `chat_template.py`


class Marker(enum.Enum):
    """A place in a prompt that is not text."""

    IMAGE = "image"
    EOS = "eos"


@dataclass(frozen=True)
class Special:
    """A special token in a prompt, by its spelling; only chat templates write any."""

    spelling: str


Piece = str | Marker | Special
Turn = tuple[str, str]  # what the user said, what the assistant answered


@dataclass(frozen=True)
class Template:
    """How a conversation is written.

    Attributes:
        name: Key in `TEMPLATES`.
        system: Text in front of the first turn, its trailing space included, where a conversation has none.
        user: Text in front of what the user says.
        assistant: Text behind it; the model continues from here.
        answer_prefix: Text between `assistant` and an answer.
        after_image: Text behind an image that is put in front of the instruction.
        turn_end: What closes an earlier answer in the history.
    """

    name: str
    system: str
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    answer_prefix: str = " "
    after_image: str = "\n"
    turn_end: Piece = Marker.EOS

    def render(
        self,
        instruction: str,
        images: int,
        history: Sequence[Turn] = (),
        *,
        system: str | None = None,
        where: str | None = None,
    ) -> tuple[Piece, ...]:
        """The prompt up to and including `assistant`, as pieces; adjacent texts are joined.

        ``<image>`` in what the user says stands for an image, and then every image needs one. Without any,
        the images go in front of the first turn. In answers of the history ``<image>`` is plain text.

        Args:
            instruction: What the user asks now.
            images: Number of images of the whole conversation.
            history: Earlier turns, oldest first.
            system: The conversation's own system turn, which replaces the template's: as FastChat's conversations
                take it, and as the chat template of llava-hf writes it (the text and a space, without a role). In it
                ``<image>`` is plain text. None or empty: the template's.
            where: File and row, for the error message.

        Raises:
            UserError: no instruction, or placeholders that do not match the images.
        """
        said = [user for user, _ in history] + [instruction]
        if check_said(said, images, where) == 0:
            said[0] = (IMAGE_PLACEHOLDER + self.after_image) * images + said[0]
        pieces: list[Piece] = [f"{system} " if system else self.system]
        for index, text in enumerate(said):
            pieces.append(self.user)
            for part, fragment in enumerate(text.split(IMAGE_PLACEHOLDER)):
                pieces += [Marker.IMAGE, fragment] if part else [fragment]
            pieces.append(self.assistant)
            if index < len(history):
                pieces += [self.answer_prefix + history[index][1].strip(), self.turn_end]
        return joined_texts(pieces)

    @property
    def anchor(self) -> str:
        """The text that an answer is encoded behind."""
        return self.assistant.strip()


def check_said(said: Sequence[str], images: int, where: str | None) -> int:
    """The number of ``<image>`` placeholders in what the user says, the last of which is the instruction.

    Raises:
        UserError: no instruction, or placeholders that do not match the images.
    """
    if not said[-1].replace(IMAGE_PLACEHOLDER, "").strip():
        raise UserError("the instruction is empty", where=where, remedy="give one or drop the row")
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in said)
    if placeholders not in (0, images):
        raise UserError(
            f"the instruction has {placeholders} {IMAGE_PLACEHOLDER} placeholders for {images} images",
            where=where,
            remedy="write one per image, or none to have the images put in front",
        )
    return placeholders


def joined_texts(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The pieces with texts that stand beside each other in one: tokenizers make other ids of their parts."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return tuple(joined)


def to_text(pieces: Iterable[Piece], *, image: str = IMAGE_PLACEHOLDER, eos: str = "</s>") -> str:
    """Pieces as one string, for people to read; never tokenise it."""
    marks = {Marker.IMAGE: image, Marker.EOS: eos}
    return "".join(
        marks[piece] if isinstance(piece, Marker) else piece.spelling if isinstance(piece, Special) else piece
        for piece in pieces
    )


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="vicuna_v1",
            system=(
                "A chat between a curious user and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the user's questions. "
            ),
        ),
        # No system line; an earlier answer ends in a space, not in EOS. An answer to be learned has EOS all
        # the same, because a model that never sees it never stops.
        Template(name="hf", system="", turn_end=" "),
        Template(name="plain", system=""),
    )
}


def get_template(name: str) -> Template:
    """The template called `name`; UserError names the nearest one otherwise.

    ``chat``, the model directory's own, is no data of ours: see `chat_template.py`.
    """
    if name not in TEMPLATES:
        names = [*TEMPLATES, CHAT]
        raise UserError(f"unknown template {name!r}{nearest(name, names)}", where="model.template")
    return TEMPLATES[name]
