"""Rows that the stages exchange, as Arrow schemas.

Prompt -> candidate -> score -> pair. Every row carries the prompt's `id`, so that a pair can be traced back to
its candidates, its prompt and its image. Files are parquet; `images` follows the `datasets` library's Image
feature (a struct of encoded `bytes` and `path`), so that TRL and `datasets` open pair files directly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Int32

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

PROMPT = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("images", pa.list_(IMAGE)),
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("reference", pa.string()),
        pa.field("metadata", pa.string()),  # JSON object
    ]
)

# Its token ids, with one image token for each run of them, and a hash of what they were made from (`PromptTokens`).
# Rows of earlier versions have none; null: the prompt is tokenised where it is needed.
PROMPT_TOKENS = pa.struct([("ids", pa.list_(pa.int32())), ("made_from", pa.string())])

CANDIDATE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("candidate", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("token_logprobs", pa.list_(pa.float32())),  # raw, temperature 1, EOS included
        pa.field("finish_reason", pa.string()),  # stop (EOS) | length | stop_string
        pa.field("sampling", pa.string()),  # JSON object of the sampling settings
        pa.field("prompt_tokens", PROMPT_TOKENS),
    ]
)

# Score rows add one float column `mas_<backend>` per backend and `confidence_<variant>` per variant.
SCORE_FIXED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("candidate", pa.int32(), nullable=False),
        pa.field("mas", pa.float64()),
        pa.field("confidence", pa.float64()),
        pa.field("m3p_preferred", pa.float64()),
        pa.field("m3p_dispreferred", pa.float64()),
        pa.field("abstained", pa.string()),  # why there is no MAS
    ]
)

_CONTENT = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
IMAGE_PART = {"type": "image", "text": None}  # of a message's content: where an image stands
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", _CONTENT)]))

PAIR = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("images", pa.list_(IMAGE)),
        pa.field("prompt", _MESSAGES),
        pa.field("chosen", _MESSAGES),
        pa.field("rejected", _MESSAGES),
        pa.field("chosen_candidate", pa.int32()),
        pa.field("rejected_candidate", pa.int32()),
        pa.field("chosen_token_ids", pa.list_(pa.int32())),
        pa.field("rejected_token_ids", pa.list_(pa.int32())),
        # Recorded at generation, when the generator is the reference; null: compute them.
        pa.field("reference_chosen_logprobs", pa.list_(pa.float32())),
        pa.field("reference_rejected_logprobs", pa.list_(pa.float32())),
        pa.field("chosen_mas", pa.float64()),
        pa.field("rejected_mas", pa.float64()),
        pa.field("chosen_confidence", pa.float64()),
        pa.field("rejected_confidence", pa.float64()),
        pa.field("value", pa.float64()),
        pa.field("prompt_tokens", PROMPT_TOKENS),
    ]
)


EXIF = ("apply", "ignore")


@dataclass(frozen=True, eq=False)
class Image:
    """An encoded image: its bytes, or a path under the data's image root, or both.

    Attributes:
        exif: ``apply``: the picture is turned upright as its EXIF orientation says, as `datasets`, TRL and
            `transformers.image_utils.load_image` do; ``ignore``: it is taken as it is stored, as LLaVA's code does.
    """

    bytes: bytes | None = None
    path: str | None = None
    exif: str = "apply"

    def __eq__(self, other: object) -> bool:
        """By content, wherever the bytes are kept."""
        if not isinstance(other, Image):
            return NotImplemented
        return (self.path, self.exif, self.bytes) == (other.path, other.exif, other.bytes)

    def __hash__(self) -> int:
        return hash((self.path, self.exif, self.bytes))

    def read(self) -> Image:
        """The image with its bytes, wherever they are kept: one reading for all that is asked of it."""
        return self

    def __repr__(self) -> str:
        size = None if self.bytes is None else len(self.bytes)
        return f"Image({size} bytes, path={self.path!r}, exif={self.exif!r})"


class ImageStore(Protocol):
    """Where the images of a table's rows lie."""

    def images(self, place: Any) -> Sequence[Image]:
        """The images of the row at `place`, read anew."""
        ...


class StoredImage(Image):
    """An image of a table's row, read whenever it is asked for: rows of a large data set hold no bytes.

    Args:
        store: Reads the row's images.
        place: The row, in the store's own words.
        number: Of the image in its row.
    """

    def __init__(self, store: ImageStore, place: Any, number: int):
        for name, value in (("_store", store), ("_place", place), ("_number", number), ("_hash", None)):
            object.__setattr__(self, name, value)

    def read(self) -> Image:
        return self._store.images(self._place)[self._number]  # type: ignore[attr-defined]

    @property
    def bytes(self) -> bytes | None:  # type: ignore[override]
        return self.read().bytes

    @property
    def path(self) -> str | None:  # type: ignore[override]
        return self.read().path

    @property
    def exif(self) -> str:  # type: ignore[override]
        return self.read().exif

    def __hash__(self) -> int:
        if self._hash is None:  # type: ignore[attr-defined]
            object.__setattr__(self, "_hash", hash(self.read()))
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        return StoredImage, (self._store, self._place, self._number)  # type: ignore[attr-defined]


class PromptTokens(NamedTuple):
    """The token ids of a prompt, before its images take their places in them.

    Attributes:
        ids: With one image token for each run of them, see `model_images.ImagePlan`.
        made_from: A hash of what the prompt says (the texts that its images bring along included), and of the
            tokenizer and template that made ids of it. They are used where it is what these would be now, and made
            anew elsewhere.
    """

    ids: Int32[np.ndarray, " n"]
    made_from: str

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> PromptTokens | None:
        """Of a row of candidates or pairs; None where it has none."""
        value = row.get("prompt_tokens")
        return None if value is None else cls(np.asarray(value["ids"], np.int32), value["made_from"])

    def value(self) -> dict[str, Any]:
        """As rows have it."""
        return {"ids": self.ids.tolist(), "made_from": self.made_from}


@dataclass(frozen=True)
class Prompt:
    """One image (or several, or none) and an instruction.

    Attributes:
        id: Unique in its data set; joins every later row.
        images: Encoded images or paths, in the order in which the instruction meets them.
        instruction: What the user asks; never empty.
        reference: A reference answer, where the data has one (SFT, evaluation).
        metadata: Anything else, JSON-serialisable (object annotations, category, split).
        where: File and row, for error messages; not stored.
        tokens: Its token ids, where they are made already.
    """

    id: str
    images: tuple[Image, ...]
    instruction: str
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    tokens: PromptTokens | None = field(default=None, compare=False, repr=False)


def prompt_to_row(prompt: Prompt) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "images": [{"bytes": image.bytes, "path": image.path} for image in prompt.images],
        "instruction": prompt.instruction,
        "reference": prompt.reference,
        "metadata": json.dumps(prompt.metadata, sort_keys=True) if prompt.metadata else None,
    }


def message(role: str, text: str, images: int = 0) -> list[dict[str, Any]]:
    """One message in TRL's vision format: image placeholders first, then the text."""
    content: list[dict[str, Any]] = [dict(IMAGE_PART) for _ in range(images)]
    content.append({"type": "text", "text": text})
    return [{"role": role, "content": content}]
