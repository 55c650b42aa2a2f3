"""Rows to model inputs: token ids with expanded image spans, and arrays of images.

Tokenisation follows LLaVA's split rule: every text piece of the template is encoded alone, one BOS stands in
front, an image is the text and the image tokens that its family plans for it. Texts are encoded with special
tokens switched off, so that ``</s>`` or ``<image>`` written by a user or a model stays text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from m3po_jax.data import schema
from m3po_jax.data.chat_template import ChatTemplate, template_note
from m3po_jax.data.image_buckets import ImageBuckets, choose_buckets
from m3po_jax.data.images import IMAGE_FITS, decode, header_size, picture_hash, read_encoded
from m3po_jax.data.kept_images import KeptImages
from m3po_jax.data.model_images import ImagePlan, ImageReader, ProcessedImage
from m3po_jax.data.pair_rows import prompt_messages
from m3po_jax.data.tables import content_hash
from m3po_jax.data.templates import (
    CHAT,
    IMAGE_PLACEHOLDER,
    Marker,
    Piece,
    Special,
    Template,
    Turn,
    get_template,
    joined_texts,
)
from m3po_jax.data.tokenizer import PlainText, TokenizerFiles, end_tokens, load_tokenizer
from m3po_jax.errors import UserError, nearest
from m3po_jax.models.image_family import TYPICAL_SIZE, ImageSettings

if TYPE_CHECKING:
    from m3po_jax.models.registry import Description

_ROWS_LOOKED_AT = 4096


@dataclass(frozen=True)
class Processor:
    """Everything between a `schema.Prompt` and a model's inputs; picklable, for loader processes.

    Attributes:
        template: The conversation template, the directory's own with ``model.template=chat``.
        text: Encodes and decodes text that is not special.
        image_reader: The family's way from an image to arrays.
        image_token_id: Stands for one vision feature.
        eos_token_id: Ends an answer that is learned.
        pad_token_id: Fills batches.
        bos_token_id: In front of every prompt; None where the tokenizer has none.
        image_root: Folder that image paths are relative to.
        max_image_pixels: Larger images are refused before they are decoded.
        max_prompt_tokens: Longer prompts are refused, never truncated; None: no limit.
        require_image: Refuse prompts without an image.
        eos_token_ids: Any of them ends an answer that is generated; `eos_token_id` is the first.
        max_positions: Of the model; a prompt that takes them all is refused. None: unknown.
        image_buckets: Sizes that rows of images are filled up to, see `with_buckets`; None: images are of one size.
        notes: What a user should know of the directory's files, a line each.
        kept: Images that were read last.
    """

    template: Template | ChatTemplate
    text: PlainText
    image_reader: ImageReader
    image_token_id: int
    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None
    image_root: Path = Path(".")
    max_image_pixels: int = 50_000_000
    max_prompt_tokens: int | None = None
    require_image: bool = False
    eos_token_ids: tuple[int, ...] = ()
    max_positions: int | None = None
    image_buckets: ImageBuckets | None = None
    notes: tuple[str, ...] = ()
    kept: KeptImages = field(default_factory=KeptImages, compare=False, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Description,
        template: str,
        image_fit: str,
        *,
        vision_tower: str | Path = "",
        image_root: str | Path = ".",
        max_image_pixels: int = 50_000_000,
        max_prompt_tokens: int | None = None,
        require_image: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        pan_and_scan: bool = False,
    ) -> Processor:
        """Reads tokenizer, image processor and templates of a model; sizes follow its configuration.

        Args:
            model: Its directory, or what `registry.describe` says of it.
            template: A name of `templates.TEMPLATES`, or ``chat`` for the directory's own.
            vision_tower: A directory whose tower, and image processor, replace the model's own.
            min_pixels, max_pixels, pan_and_scan: See `image_family.ImageSettings`.

        Raises:
            UserError: a file is missing or malformed, or the files contradict each other.
        """
        from m3po_jax.models.registry import FAMILIES, Description, describe

        if image_fit not in IMAGE_FITS:
            raise UserError(
                f"unknown image_fit {image_fit!r}{nearest(image_fit, IMAGE_FITS)}", where="model.image_fit"
            )
        if not isinstance(model, Description):
            model = describe(model, vision_tower=vision_tower, weights=False, download=False)
        folder, config = model.directory, model.config
        where = str(folder)
        family = model.family.images
        if family is None:
            answering = ", ".join(one.name for one in FAMILIES if one.images is not None)
            raise UserError(
                f"a {model.family.name} model is not one that answers about images",
                where=where,
                remedy=f"take a model of one of these families: {answering}",
            )
        if pan_and_scan and not family.pan_and_scan:
            raise UserError(
                f"a {model.family.name} model is shown no crops", where="model.pan_and_scan", remedy="remove it"
            )
        settings = ImageSettings(image_fit, min_pixels, max_pixels, pan_and_scan)  # type: ignore[arg-type]
        files = load_tokenizer(folder)
        tokenizer, rows = files.tokenizer, config.text.vocab_size
        image_token_id = config.image_token_id
        pad = _pad_token(files, model.raw_config, rows)
        if model.stored_rows is None:
            files.check_rows(rows)
        else:  # rows were added for these two: one stands for features, the other is masked
            files.check_rows(model.stored_rows, frozenset({image_token_id, pad}))
        ends = end_tokens(files, model.raw_config, model.stored_rows or rows)
        _check_image_token(files, image_token_id, family.token_key, {*ends.ids, pad, tokenizer.bos_token_id})
        if template == CHAT:
            chosen: Template | ChatTemplate = ChatTemplate.from_files(files, image_token_id, family.placeholder)
        else:
            chosen = get_template(template)
        end_ids = ends.ids
        if isinstance(chosen, ChatTemplate) and chosen.answer_end is not None:
            closing = tokenizer.convert_tokens_to_ids(chosen.answer_end)
            end_ids = tuple(dict.fromkeys((closing, *end_ids)))
        unknown = tokenizer.unk_token_id
        special = {*tokenizer.all_special_ids, tokenizer.eos_token_id, *(x for x in end_ids if x in files.added)}
        forbidden = {*special, pad, image_token_id} - {unknown}
        notes = (*model.notes, ends.note, template_note(chosen, files, image_token_id, family.placeholder))
        reader = family.reader(config, [*filter(None, [model.tower]), folder], settings)
        _check_marks(files, reader.plan(lambda: TYPICAL_SIZE).written, family.marks(config))
        return cls(
            template=chosen,
            text=PlainText(files.serialized, frozenset(forbidden), unknown),
            image_reader=reader,
            image_token_id=image_token_id,
            eos_token_id=end_ids[0],
            pad_token_id=pad,
            bos_token_id=None if isinstance(chosen, ChatTemplate) else files.bos_token_id,
            image_root=Path(image_root),
            max_image_pixels=max_image_pixels,
            max_prompt_tokens=max_prompt_tokens,
            require_image=require_image,
            eos_token_ids=end_ids,
            max_positions=config.text.max_positions,
            image_buckets=ImageBuckets() if family.several_sizes else None,
            notes=tuple(note for note in notes if note),
        )

    def render(self, prompt: schema.Prompt) -> tuple[Piece, ...]:
        """The prompt's pieces, with ``metadata["history"]`` (a list of [user, assistant] turns) and
        ``metadata["system"]`` (the text of a system turn)."""
        if self.require_image and not prompt.images:
            raise UserError("the row has no image", where=prompt.where or None, remedy="add one or drop the row")
        return self.template.render(
            prompt.instruction,
            len(prompt.images),
            _history(prompt),
            system=_system(prompt),
            where=prompt.where or None,
        )

    @property
    def _encoding(self) -> str:
        """A hash of what a prompt's token ids depend on beside what the prompt says."""
        # Where a model directory lies changes nothing.
        names = [field.name for field in dataclasses.fields(self.template) if field.name != "folder"]
        template = {name: repr(getattr(self.template, name)) for name in names}
        return content_hash(template, self.text.identity, self.image_token_id, self.eos_token_id, self.bos_token_id)

    def tokenise(self, prompt: schema.Prompt) -> schema.PromptTokens:
        """The prompt's token ids before images are put in: those that it brings along, if this processor would make
        the same of what it says now, else made here.

        Raises:
            UserError: as `encode_prompt`, but for what concerns its length.
        """
        return self._tokenised(prompt, self.image_plans(prompt))

    def _tokenised(self, prompt: schema.Prompt, plans: Sequence[ImagePlan]) -> schema.PromptTokens:
        _history(prompt)
        written = [repr(plan.pieces) for plan in plans if plan.written]
        made_from = content_hash(self._encoding, prompt_messages(prompt), *written)[:16]
        if prompt.tokens is not None and prompt.tokens.made_from == made_from:
            return prompt.tokens
        return schema.PromptTokens(np.array(self._ids(prompt, plans), np.int32), made_from)

    def _ids(self, prompt: schema.Prompt, plans: Sequence[ImagePlan]) -> list[int]:
        pieces = _with_images(self.render(prompt), plans)
        spelt = self.template.spelt(pieces) if isinstance(self.template, ChatTemplate) else None
        if spelt is not None:
            return self.text.encode_with_tokens(spelt)
        ids = [] if self.bos_token_id is None else [self.bos_token_id]
        for piece in pieces:
            ids += self._ids_of(piece, _place(prompt))
        return ids

    def encode_prompt(self, prompt: schema.Prompt) -> Int[np.ndarray, " tokens"]:
        """Ids of the prompt (int32): BOS, text, and for each image what its plan says.

        Raises:
            UserError: empty instruction, missing image, placeholders that do not match the images, or more
                than `max_prompt_tokens`.
        """
        where = _place(prompt)
        plans = self.image_plans(prompt)
        ids = self._tokenised(prompt, plans).ids
        counts = [tokens for plan in plans for tokens in plan.runs]
        places = np.flatnonzero(ids == self.image_token_id)
        if len(places) != len(counts):
            raise AssertionError(f"{where}: {len(places)} runs of image tokens, expected {len(counts)}")
        repeats = np.ones(len(ids), int)
        repeats[places] = counts
        ids, expected = np.repeat(ids, repeats), sum(counts)
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise UserError(
                f"the prompt has {len(ids)} tokens ({expected} of them for images), more than "
                f"model.max_prompt_tokens = {self.max_prompt_tokens}",
                where=where,
                remedy="raise it, shorten the instruction or drop the row",
            )
        if self.max_positions is not None and len(ids) >= self.max_positions:
            raise UserError(
                f"the prompt has {len(ids)} tokens ({expected} of them for images), which leaves none of the model's "
                f"{self.max_positions} positions (max_position_embeddings) for an answer",
                where=where,
                remedy="shorten the instruction or drop the row",
            )
        return ids

    def _ids_of(self, piece: Piece, where: str) -> list[int]:
        if piece is Marker.IMAGE:
            return [self.image_token_id]
        if piece is Marker.EOS:
            return [self.eos_token_id]
        if isinstance(piece, Special):
            token = self.text.token_id(piece.spelling)
            assert token is not None, piece
            return [token]
        return self._encode(str(piece), where)

    def encode_answer(self, text: str, *, where: str | None = None) -> Int[np.ndarray, " tokens"]:
        """Ids of an answer (int32) as it follows the prompt, EOS included; outer white space is dropped."""
        text = text.strip()
        if not text:
            return np.array([self.eos_token_id], np.int32)
        # Where the space between prompt and answer goes is the tokenizer's affair (its own token, part of the
        # first word, a dummy prefix), so the answer is encoded behind the word that precedes it.
        anchor = self.template.anchor
        head = self._encode(anchor, where)
        joint = self._encode(anchor + self.template.answer_prefix + text, where)
        ids = joint[len(head) :] if joint[: len(head)] == head else self._encode(text, where)
        return np.array([*ids, self.eos_token_id], np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " tokens"]) -> str:
        """Text of an answer's ids: no special tokens, stripped."""
        return self.text.decode(int(token) for token in ids)

    def image_plans(self, prompt: schema.Prompt) -> list[ImagePlan]:
        """What the sizes of the prompt's images say; no pixel is read.

        Raises:
            UserError: naming the row, for a header that cannot be read, and an image that cannot be fitted.
        """
        where = _place(prompt)
        try:
            return [self.image_reader.plan(partial(self._size, image, where)) for image in prompt.images]
        except UserError as error:
            raise UserError(error.what, where=error.where or where, remedy=error.remedy) from None

    def with_buckets(self, prompts: Sequence[schema.Prompt], most: int) -> Processor:
        """The processor with at most so many sizes of rows of images, chosen for prompts like these.

        No more than `_ROWS_LOOKED_AT` of them are looked at, evenly among all, and of their images the headers alone.
        """
        if self.image_buckets is None:
            return self
        counts: list[list[int]] = []
        for row in range(0, len(prompts), max(1, -(-len(prompts) // _ROWS_LOOKED_AT))):
            with contextlib.suppress(UserError):  # whoever uses the row says what is wrong with it
                counts.append([plan.tokens for plan in self.image_plans(prompts[row])])
        return dataclasses.replace(self, image_buckets=choose_buckets(counts, most))

    def _size(self, image: schema.Image, where: str) -> tuple[int, int]:
        return header_size(image, root=self.image_root, max_pixels=self.max_image_pixels, where=where)

    def images(self, prompt: schema.Prompt) -> tuple[ProcessedImage, ...]:
        """The prompt's images as the model takes them.

        Raises:
            UserError: naming the row, for anything that is wrong with an image.
        """
        where = _place(prompt)
        done = []

        def read(image: schema.Image) -> dict[str, np.ndarray]:
            decoded = decode(image, root=self.image_root, max_pixels=self.max_image_pixels, where=where)
            try:
                return self.image_reader.read(decoded)
            except UserError as error:
                raise UserError(error.what, where=where, remedy=error.remedy) from None

        for image, plan in zip(prompt.images, self.image_plans(prompt), strict=True):
            arrays = self.kept.get(image, self.image_root, self.max_image_pixels, read)
            if {name: x.shape for name, x in arrays.items()} != plan.shapes:
                raise UserError(
                    "the image's header and its pixels say different sizes",
                    where=where,
                    remedy="save it anew or drop the row",
                )
            done.append(plan.filled(**arrays))
        return tuple(done)

    def absent_images(self, prompt: schema.Prompt) -> tuple[ProcessedImage, ...]:
        """Zeros that take no memory, where another host needs the prompt's images."""
        return tuple(plan.absent for plan in self.image_plans(prompt))

    def image_keys(self, prompt: schema.Prompt) -> list[str]:
        """Content hashes of the prompt's images."""
        where = _place(prompt)
        return [picture_hash(read_encoded(image, root=self.image_root, where=where)) for image in prompt.images]

    def _encode(self, text: str, where: str | None) -> list[int]:
        try:
            return self.text.encode(text)
        except UserError as error:
            raise UserError(error.what, where=where, remedy=error.remedy) from None


def _with_images(pieces: Sequence[Piece], plans: Sequence[ImagePlan]) -> tuple[Piece, ...]:
    """A rendered prompt with what each image's plan writes in the place of its marker."""
    images = iter(plans)
    return joined_texts(
        part for piece in pieces for part in (next(images).pieces if piece is Marker.IMAGE else (piece,))
    )


def _place(prompt: schema.Prompt) -> str:
    return prompt.where or f"id {prompt.id!r}"


def _pad_token(files: TokenizerFiles, raw_config: Mapping[str, Any], rows: int) -> int:
    """What fills batches: the tokenizer's, the configuration's, or the end token; it is masked everywhere.

    Raises:
        UserError: it has no row among the embeddings, and what is read there is not a number.
    """
    stated = files.tokenizer.pad_token_id
    if stated is None:
        stated = raw_config.get("pad_token_id")
    pad = files.tokenizer.eos_token_id if stated is None or stated < 0 else stated
    if pad >= rows:
        raise UserError(
            f"pad_token_id {pad} is beyond the model's {rows} rows of embeddings",
            where=str(files.folder),
            remedy="set the tokenizer's pad_token",
        )
    return pad


def _check_image_token(files: TokenizerFiles, image_token_id: int, key: str, others: set[int | None]) -> None:
    """
    Raises:
        UserError: the configuration's image token is another token of the tokenizer.
    """
    where, remedy = str(files.folder), "take both files from the same model"
    named = getattr(files.tokenizer, "image_token", None) or IMAGE_PLACEHOLDER
    token_id = files.tokenizer.get_vocab().get(named)
    if token_id is not None and token_id != image_token_id:
        raise UserError(
            f"{key} is {image_token_id} in config.json, and {named} is {token_id} in the tokenizer",
            where=where,
            remedy=remedy,
        )
    if image_token_id in others:
        raise UserError(
            f"{key} {image_token_id} is the tokenizer's token for an end, a start or padding",
            where=where,
            remedy=remedy,
        )
    if token_id is None and image_token_id < files.size and image_token_id not in files.added:
        word = files.tokenizer.convert_ids_to_tokens(image_token_id)
        if word is not None:
            raise UserError(
                f"{key} {image_token_id} is the tokenizer's {word!r}, which texts contain",
                where=where,
                remedy=remedy,
            )


def _check_marks(files: TokenizerFiles, written: Sequence[Piece | int], stated: Mapping[str, int]) -> None:
    """
    Raises:
        UserError: the tokenizer lacks a token that is written around images, or has it under another id.
    """
    vocabulary = files.tokenizer.get_vocab()
    for spelling in dict.fromkeys([*(part.spelling for part in written if isinstance(part, Special)), *stated]):
        token = vocabulary.get(spelling)
        if token is None or token != stated.get(spelling, token):
            says = "has no such token" if token is None else f"says {token}"
            expected = f", {stated[spelling]} in config.json" if spelling in stated else ""
            raise UserError(
                f"{spelling} stands beside images{expected}, and the tokenizer {says}",
                where=str(files.folder),
                remedy="take both files from the same model",
            )


def _history(prompt: schema.Prompt) -> list[Turn]:
    history = prompt.metadata.get("history") or []
    turns = [tuple(turn) if isinstance(turn, (list, tuple)) else () for turn in history]
    if not all(len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns):
        raise UserError("history is not a list of [user, assistant] texts", where=_place(prompt))
    return [(user, assistant) for user, assistant in turns]


def _system(prompt: schema.Prompt) -> str | None:
    system = prompt.metadata.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError("the system turn is not a text", where=_place(prompt))
    return system
