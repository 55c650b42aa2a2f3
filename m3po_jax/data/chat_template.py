"""A model directory's own conversation template, rendered as transformers renders it (``model.template=chat``).

The template is untrusted code and runs in transformers' sandbox. What users and models wrote cannot act as a
special token: inside it, spellings of such tokens are broken up before rendering and mended behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from m3po_jax.data.templates import (
    IMAGE_PLACEHOLDER,
    Marker,
    Piece,
    Special,
    Template,
    Turn,
    check_said,
    to_text,
)
from m3po_jax.data.tokenizer import TokenizerFiles, read_object
from m3po_jax.errors import UserError

FILES = ("chat_template.json", "chat_template.jinja", "processor_config.json", "tokenizer_config.json")
_USER, _ANSWER = "what the user says", "what the model answers"  # for trying a template out


def read_chat_template(folder: Path) -> str | None:
    """The source of a directory's template, where transformers finds it; None: there is none.

    Raises:
        UserError: a file that is malformed.
    """
    processor = read_object(folder / "processor_config.json").get("chat_template")
    older = read_object(folder / "chat_template.json").get("chat_template")
    path = folder / "chat_template.jinja"
    try:
        beside = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from None
    stated = (processor, older, beside, read_object(folder / "tokenizer_config.json").get("chat_template"))
    return next((source for source in map(_default, stated) if source is not None), None)


def _default(stated: Any) -> str | None:
    """A template, or the one called default of several, as a list of named ones or as a mapping."""
    if isinstance(stated, list):
        stated = {str(entry.get("name")): entry.get("template") for entry in stated if isinstance(entry, dict)}
    source = stated.get("default") if isinstance(stated, dict) else stated
    return source if isinstance(source, str) else None


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the interface of `templates.Template`; picklable.

    Attributes:
        source: The template.
        variables: What it may name beside the messages, ``bos_token`` and its like.
        image_token: How an image stands in what it writes.
        run_token: How a run of image tokens is spelt for the tokenizer; the same in most families.
        controls: Spellings that are tokens of their own, the image's included.
        front: The tokenizer's BOS where it adds one, which stands in front unless the template writes it.
        folder: For messages.
    """

    source: str
    variables: Mapping[str, str]
    image_token: str
    run_token: str
    controls: tuple[str, ...]
    front: str
    folder: str
    name: str = "chat"

    @classmethod
    def from_files(cls, files: TokenizerFiles, image_token_id: int, placeholder: str = "") -> ChatTemplate:
        """The template of a directory.

        Args:
            placeholder: What it writes for an image; "": the image token.

        Raises:
            UserError: there is none, or it does not do what is asked of it.
        """
        source = read_chat_template(files.folder)
        if source is None:
            raise UserError(
                "the model directory has no chat template",
                where="model.template",
                remedy=f"use another template, or add one of {', '.join(FILES)} to {files.folder}",
            )
        tokenizer = files.tokenizer
        run_token = files.added.get(image_token_id, IMAGE_PLACEHOLDER)
        image_token = placeholder or run_token
        named = tokenizer.special_tokens_map.items()
        variables = {name: token for name, token in named if isinstance(token, str)}
        controls = {*files.added.values(), *tokenizer.all_special_tokens, image_token, run_token}
        bos = tokenizer.bos_token
        adds = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
        ordered = tuple(sorted(controls - {""}, key=lambda token: (-len(token), token)))
        template = cls(source, variables, image_token, run_token, ordered, bos if adds else "", str(files.folder))
        _ = template.trial
        return template

    def _rendered(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            compiled = _compile_jinja_template(self.source)
            text = compiled.render(
                messages=messages, add_generation_prompt=generation, tools=None, documents=None, **self.variables
            )
        except Exception as error:  # Jinja's own errors, and whatever the template's expressions raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"the chat template cannot be rendered ({reason})",
                where=self.folder,
                remedy="use another model.template, or correct it",
            ) from None
        return text if text.startswith(self.front) else self.front + text

    @cached_property
    def trial(self) -> tuple[bool, str, str, str]:
        """Found by rendering a conversation: whether contents are lists of parts, what stands between what the user
        says and the answer, between that and the answer's text, and behind the answer's text."""
        problem: UserError | None = None
        for parts in (True, False):
            try:
                asked = [_message("user", _USER, 1, parts, self.image_token)]
                prompt = self._rendered(asked, generation=True)
                answered = [*asked, _message("assistant", _ANSWER, 0, parts, self.image_token)]
                whole = self._rendered(answered, generation=False)
            except UserError as error:
                problem = error
                continue
            good = all(
                text.count(_USER) == 1 and text.count(self.image_token) == 1 and "'type'" not in text
                for text in (prompt, whole)
            )
            if good and whole.count(_ANSWER) == 1:
                before, _, after = whole.partition(_ANSWER)
                prefix = before.removeprefix(prompt) if before.startswith(prompt) else ""
                return parts, prompt.partition(_USER)[2], prefix, after
        raise problem or UserError(
            "the chat template does not write the image and the text of a conversation once each",
            where=self.folder,
            remedy="use another model.template",
        )

    @property
    def anchor(self) -> str:
        """The text that an answer is encoded behind: what the prompt ends with, after its last special token."""
        return self._split(self.trial[1])[-1].lstrip() if self.trial[1] else ""

    @property
    def answer_prefix(self) -> str:
        """Text between the prompt and an answer."""
        return self.trial[2]

    @property
    def answer_end(self) -> str | None:
        """The special token that the template closes an answer with; None: it writes none."""
        after = self.trial[3].strip()
        return next((token for token in self.controls if after.startswith(token)), None)

    def _split(self, text: str) -> list[str]:
        """Texts and tokens in turn, a text first and last."""
        return re.split(f"({'|'.join(map(re.escape, self.controls))})", text)

    def render(
        self,
        instruction: str,
        images: int,
        history: Sequence[Turn] = (),
        *,
        system: str | None = None,
        where: str | None = None,
    ) -> tuple[Piece, ...]:
        """The prompt up to where the model answers, as pieces; see `Template.render` for the arguments.

        A line feed beside an ``<image>`` in what the user says belongs to it: the template decides what stands there.
        """
        said = [*(user for user, _ in history), instruction]
        placeholders = check_said(said, images, where)
        taken = "".join([self.source, system or "", *said, *(answer for _, answer in history)])
        # A character that nobody used breaks the spelling of tokens in what people wrote.
        breaker = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in taken)
        pattern = re.compile("|".join(map(re.escape, self.controls)))
        broken = lambda text: pattern.sub(lambda token: token[0][0] + breaker + token[0][1:], text)  # noqa: E731
        parts = self.trial[0]
        messages = [_message("system", broken(system), 0, parts, self.image_token)] if system else []
        for index, text in enumerate(said):
            pieces = [text]
            if placeholders:
                pieces = re.split(rf"\n?{re.escape(IMAGE_PLACEHOLDER)}\n?", text)
            in_front = images if index == 0 and not placeholders else 0
            messages.append(_user_message([broken(piece) for piece in pieces], in_front, parts, self.image_token))
            if index < len(history):
                messages.append(_message("assistant", broken(history[index][1].strip()), 0, parts, self.image_token))
        rendered = self._rendered(messages, generation=True)
        pieces_out: list[Piece] = []
        for number, fragment in enumerate(self._split(rendered)):
            if number % 2:
                pieces_out.append(Marker.IMAGE if fragment == self.image_token else Special(fragment))
            elif fragment:
                pieces_out.append(fragment.replace(breaker, ""))
        written = pieces_out.count(Marker.IMAGE)
        if written != images:
            raise UserError(
                f"the chat template writes {written} images for {images}",
                where=where or self.folder,
                remedy="use another model.template",
            )
        return tuple(pieces_out)

    def spelt(self, pieces: Sequence[Piece]) -> str | None:
        """The pieces as the text that transformers tokenises; None where text in it would act as a token."""
        pattern = "|".join(map(re.escape, self.controls))
        if any(isinstance(piece, str) and re.search(pattern, piece) for piece in pieces):
            return None
        return to_text(pieces, image=self.run_token)


def _user_message(texts: list[str], in_front: int, parts: bool, image_token: str) -> dict[str, Any]:
    """Texts with an image between each two, and `in_front` images before them."""
    if not parts:
        spelt = f"{image_token}\n".join([texts[0], *(texts[1:])])
        return {"role": "user", "content": f"{image_token}\n" * in_front + spelt}
    content: list[dict[str, str]] = [{"type": "image"}] * in_front
    for number, text in enumerate(texts):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": text}] if text or len(texts) == 1 else []
    return {"role": "user", "content": content}


def _message(role: str, text: str, images: int, parts: bool, image_token: str) -> dict[str, Any]:
    return {**_user_message([text], images, parts, image_token), "role": role}


def template_note(
    template: Template | ChatTemplate, files: TokenizerFiles, image_token_id: int, placeholder: str = ""
) -> str:
    """A line where the directory has a template that writes something else than the one used; else empty."""
    if isinstance(template, ChatTemplate) or read_chat_template(files.folder) is None:
        return ""
    try:
        shipped = ChatTemplate.from_files(files, image_token_id, placeholder)
        turn = [("What is this?", "A bus.")]
        same = all(
            _comparable(shipped.render("Where is it?", 1, history), shipped.front, files)
            == _comparable(template.render("Where is it?", 1, history), shipped.front, files)
            for history in ((), turn)
        )
    except UserError as error:
        return f"{files.folder}: the directory's own chat template is not used: {error.what}"
    if same:
        return ""
    return (
        f"{files.folder}: the directory has a chat template, which writes other prompts than model.template="
        f"{template.name}; model.template=chat uses it"
    )


def _comparable(pieces: Sequence[Piece], front: str, files: TokenizerFiles) -> str:
    text = to_text(pieces, eos=files.tokenizer.eos_token)
    return " ".join(text.removeprefix(files.tokenizer.bos_token or "").split())
