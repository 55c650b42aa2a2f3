"""Rows to model inputs: token ids with expanded image spans, and pixel values.

Tokenisation follows LLaVA's split rule: every text piece of the template is encoded alone, one BOS stands in
front, an image is as many image tokens as the vision tower gives features. Texts are encoded with special
tokens switched off, so that ``</s>`` or ``<image>`` written by a user or a model stays text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from m3po_jax.data import schema
from m3po_jax.data.images import IMAGE_FITS, ImageFit, ImageProcessor, decode, read_encoded
from m3po_jax.data.tables import content_hash
from m3po_jax.data.templates import Marker, Piece, Template, Turn, get_template, to_text
from m3po_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Positions that a vision tower adds to its patches (CLIP's class token).
_EXTRA_POSITIONS = {"clip_vision_model": 1, "siglip_vision_model": 0}


class PlainText:
    """A tokenizer for text that must stay text.

    Special tokens have no effect here, whatever the text says, and none of `forbidden` can come out.

    Args:
        serialized: A `tokenizers` tokenizer as JSON.
        forbidden: Ids that text must never give: BOS, EOS, PAD, the image token.
        unknown: What stands for a word that is spelt like one of them in a vocabulary of whole words.
    """

    def __init__(self, serialized: str, forbidden: frozenset[int], unknown: int | None):
        from tokenizers import Tokenizer

        # Only tokens marked special can be switched off, and llava-hf's <image> is not marked so.
        content = json.loads(serialized)
        for token in content.get("added_tokens", ()):
            token["special"] = token["special"] or token["id"] in forbidden
        self._arguments = (serialized, forbidden, unknown)
        self._forbidden, self._unknown = forbidden, unknown
        self._tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(content))
        self._tokenizer.encode_special_tokens = True
        self._whole_words = content.get("model", {}).get("type") == "WordLevel"
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __reduce__(self) -> tuple[type[PlainText], tuple[str, frozenset[int], int | None]]:
        # The tokenizer's own pickling loses `encode_special_tokens`.
        return PlainText, self._arguments

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without BOS.

        Raises:
            UserError: the text cannot be told from a special token (whole-word vocabularies without <unk>).
        """
        # Lone surrogates (broken JSON escapes) cannot be encoded at all.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        if self._unknown is None:
            raise UserError(f"the text {text[:80]!r} contains the spelling of a special token")
        return [self._unknown if token in self._forbidden else token for token in ids]

    @property
    def size(self) -> int:
        """One more than the largest id; a model's vocabulary may be padded beyond it."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def convert_ids_to_tokens(self, token: int) -> str:
        """The piece of one id, with ``▁`` where a space precedes it (as transformers names and writes it)."""
        piece = self._tokenizer.id_to_token(token) or f"<{token}>"
        # A vocabulary of whole words keeps no spaces: every word but punctuation follows one.
        return f"▁{piece}" if self._whole_words and any(letter.isalnum() for letter in piece) else piece

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens and outer white space."""
        return self._tokenizer.decode(
            [token for token in ids if token not in self._forbidden], skip_special_tokens=True
        ).strip()


@dataclass(frozen=True)
class Processor:
    """Everything between a `schema.Prompt` and a model's inputs; picklable, for loader processes.

    Attributes:
        template: The conversation template.
        text: Encodes and decodes text that is not special.
        image_processor: The model's pixel pipeline.
        image_fit: How images are fitted to the square.
        image_token_id: Stands for one vision feature.
        tokens_per_image: Vision features of one image.
        eos_token_id: Ends an answer.
        pad_token_id: Fills batches.
        bos_token_id: In front of every prompt; None where the tokenizer has none.
        image_root: Folder that image paths are relative to.
        max_image_pixels: Larger images are refused before they are decoded.
        max_prompt_tokens: Longer prompts are refused, never truncated; None: no limit.
        require_image: Refuse prompts without an image.
    """

    template: Template
    text: PlainText
    image_processor: ImageProcessor
    image_fit: ImageFit
    image_token_id: int
    tokens_per_image: int
    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None
    image_root: Path = Path(".")
    max_image_pixels: int = 50_000_000
    max_prompt_tokens: int | None = None
    require_image: bool = False

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        template: str,
        image_fit: str,
        *,
        image_root: str | Path = ".",
        max_image_pixels: int = 50_000_000,
        max_prompt_tokens: int | None = None,
        require_image: bool = False,
    ) -> Processor:
        """Reads tokenizer, image processor and config.json of a local model directory in Hugging Face layout.

        Raises:
            UserError: a file is missing or malformed, or the files contradict each other.
        """
        folder = Path(model_dir)
        where = str(folder)
        if not folder.is_dir():
            raise UserError("no such model directory", where=where)
        if image_fit not in IMAGE_FITS:
            raise UserError(
                f"unknown image_fit {image_fit!r}{nearest(image_fit, IMAGE_FITS)}", where="model.image_fit"
            )
        config = _read_json(folder / "config.json")
        tokenizer, serialized = _load_tokenizer(folder)
        image_token_id = config.get("image_token_index", config.get("image_token_id"))
        if not isinstance(image_token_id, int):
            raise UserError("config.json has no image_token_index", where=where)
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token", where=where, remedy="set eos_token")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.get("pad_token_id")
        pad = tokenizer.eos_token_id if pad is None else pad
        image_processor = ImageProcessor.from_pretrained(folder)
        side = _vision_setting(config, "image_size", where)
        if (image_processor.height, image_processor.width) != (side, side):
            raise UserError(
                f"the image processor gives {image_processor.height} x {image_processor.width} pixels, "
                f"config.json says {side}",
                where=where,
                remedy="take both files from the same model",
            )
        unknown = tokenizer.unk_token_id
        forbidden = {*tokenizer.all_special_ids, tokenizer.eos_token_id, pad, image_token_id} - {unknown}
        return cls(
            template=get_template(template),
            text=PlainText(serialized, frozenset(forbidden), unknown),
            image_processor=image_processor,
            image_fit=image_fit,  # type: ignore[arg-type]  # checked above
            image_token_id=image_token_id,
            tokens_per_image=image_tokens(config, where=where),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            bos_token_id=tokenizer.bos_token_id,
            image_root=Path(image_root),
            max_image_pixels=max_image_pixels,
            max_prompt_tokens=max_prompt_tokens,
            require_image=require_image,
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

    def prompt_text(self, prompt: schema.Prompt) -> str:
        """The prompt as one string with one ``<image>`` per image, for records and reports."""
        return to_text(self.render(prompt))

    def encode_prompt(self, prompt: schema.Prompt) -> Int[np.ndarray, " tokens"]:
        """Ids of the prompt (int32): BOS, text, and `tokens_per_image` image tokens for each image.

        Raises:
            UserError: empty instruction, missing image, placeholders that do not match the images, or more
                than `max_prompt_tokens`.
        """
        where = prompt.where or f"id {prompt.id!r}"
        ids = [] if self.bos_token_id is None else [self.bos_token_id]
        for piece in self.render(prompt):
            if piece is Marker.IMAGE:
                ids += [self.image_token_id] * self.tokens_per_image
            elif piece is Marker.EOS:
                ids.append(self.eos_token_id)
            else:
                ids += self._encode(str(piece), where)
        expected = len(prompt.images) * self.tokens_per_image
        if ids.count(self.image_token_id) != expected:
            raise AssertionError(f"{where}: {ids.count(self.image_token_id)} image tokens, expected {expected}")
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise UserError(
                f"the prompt has {len(ids)} tokens ({expected} of them for images), more than "
                f"model.max_prompt_tokens = {self.max_prompt_tokens}",
                where=where,
                remedy="raise it, shorten the instruction or drop the row",
            )
        return np.array(ids, np.int32)

    def encode_answer(self, text: str, *, where: str | None = None) -> Int[np.ndarray, " tokens"]:
        """Ids of an answer (int32) as it follows the prompt, EOS included; outer white space is dropped."""
        text = text.strip()
        if not text:
            return np.array([self.eos_token_id], np.int32)
        # Where the space between prompt and answer goes is the tokenizer's affair (its own token, part of the
        # first word, a dummy prefix), so the answer is encoded behind the word that precedes it.
        anchor = self.template.assistant.strip()
        head = self._encode(anchor, where)
        joint = self._encode(anchor + self.template.answer_prefix + text, where)
        ids = joint[len(head) :] if joint[: len(head)] == head else self._encode(text, where)
        return np.array([*ids, self.eos_token_id], np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " tokens"]) -> str:
        """Text of an answer's ids: no special tokens, stripped."""
        return self.text.decode(int(token) for token in ids)

    def pixel_values(self, prompt: schema.Prompt) -> Float[np.ndarray, "images height width 3"]:
        """Normalised pixels of all images of the prompt, float32; shape (0, H, W, 3) without images.

        Raises:
            UserError: naming the row, for anything that is wrong with an image.
        """
        size = (self.image_processor.height, self.image_processor.width)
        pixels = np.zeros((len(prompt.images), *size, 3), np.float32)
        for index, image in enumerate(prompt.images):
            where = prompt.where or f"id {prompt.id!r}"
            decoded = decode(image, root=self.image_root, max_pixels=self.max_image_pixels, where=where)
            try:
                pixels[index] = self.image_processor(decoded, self.image_fit)
            except UserError as error:
                raise UserError(error.what, where=where, remedy=error.remedy) from None
        return pixels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image's pixels."""
        return self.image_processor.height, self.image_processor.width, 3

    def image_keys(self, prompt: schema.Prompt) -> list[str]:
        """Content hashes of the prompt's images, as they are encoded."""
        where = prompt.where or f"id {prompt.id!r}"
        return [
            hashlib.sha256(read_encoded(image, root=self.image_root, where=where)).hexdigest()
            for image in prompt.images
        ]

    def preprocessing_key(self) -> str:
        """A hash of everything between an encoded image and its pixels."""
        return content_hash(dataclasses.asdict(self.image_processor), self.image_fit)

    def _encode(self, text: str, where: str | None) -> list[int]:
        try:
            return self.text.encode(text)
        except UserError as error:
            raise UserError(error.what, where=where, remedy=error.remedy) from None


def image_tokens(config: dict[str, Any], *, where: str = "config.json") -> int:
    """Features that the vision tower of a LLaVA-style config.json hands over per image.

    (image_size / patch_size)^2 patches and the tower's extra positions, of which strategy `default` drops the
    first. `image_seq_length` is not read: transformers writes 576 there for models of any size.
    """
    side = _vision_setting(config, "image_size", where)
    patch = _vision_setting(config, "patch_size", where)
    tower = config["vision_config"].get("model_type", "clip_vision_model")
    if tower not in _EXTRA_POSITIONS:
        raise UserError(f"unknown vision tower {tower!r}{nearest(tower, _EXTRA_POSITIONS)}", where=where)
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise UserError(f"unknown vision_feature_select_strategy {strategy!r}", where=where)
    return (side // patch) ** 2 + _EXTRA_POSITIONS[tower] - (strategy == "default")


def _vision_setting(config: dict[str, Any], name: str, where: str) -> int:
    vision = config.get("vision_config")
    value = vision.get(name) if isinstance(vision, dict) else None
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json has no vision_config.{name}", where=where, remedy="add the model's value")
    return value


def _history(prompt: schema.Prompt) -> list[Turn]:
    history = prompt.metadata.get("history") or []
    turns = [tuple(turn) if isinstance(turn, (list, tuple)) else () for turn in history]
    if not all(len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns):
        raise UserError("history is not a list of [user, assistant] texts", where=prompt.where or f"id {prompt.id!r}")
    return [(user, assistant) for user, assistant in turns]


def _system(prompt: schema.Prompt) -> str | None:
    system = prompt.metadata.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError("the system turn is not a text", where=prompt.where or f"id {prompt.id!r}")
    return system


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", where=str(path), remedy="copy it from the model's repository") from None
    except (OSError, ValueError) as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=str(path))
    return content


def _load_tokenizer(folder: Path) -> tuple[Any, str]:
    """The tokenizer of `folder` (for its special ids) and its `tokenizers` JSON.

    The JSON comes from tokenizer.json where there is one: transformers 5 rebuilds LLaMA tokenizers with other
    rules for leading spaces, and the split rule's ids would differ.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes fork
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types on malformed folders
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot load the tokenizer ({reason})",
            where=str(folder),
            remedy="tokenizer.json and tokenizer_config.json must be there",
        ) from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no fast version", where=str(folder), remedy="add its tokenizer.json")
    path = folder / "tokenizer.json"
    return tokenizer, path.read_text(encoding="utf-8") if path.is_file() else backend.to_str()
