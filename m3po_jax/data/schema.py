"""Rows that the stages exchange, as Arrow schemas (DESIGN section 3).

Prompt -> candidate -> score -> pair. Every row carries the prompt's `id`, so that a pair can be traced back to
its candidates, its prompt and its image. Files are parquet; `images` follows the `datasets` library's Image
feature (a struct of encoded `bytes` and `path`), so that TRL and `datasets` open pair files directly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

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

CANDIDATE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("candidate", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("token_logprobs", pa.list_(pa.float32())),  # raw, temperature 1, EOS included
        pa.field("finish_reason", pa.string()),  # stop (EOS) | length | stop_string
        pa.field("sampling", pa.string()),  # JSON object of the sampling settings
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
        # Recorded at generation, when the generator is the reference (METHOD section 4); null: compute them.
        pa.field("reference_chosen_logprobs", pa.list_(pa.float32())),
        pa.field("reference_rejected_logprobs", pa.list_(pa.float32())),
        pa.field("chosen_mas", pa.float64()),
        pa.field("rejected_mas", pa.float64()),
        pa.field("chosen_confidence", pa.float64()),
        pa.field("rejected_confidence", pa.float64()),
        pa.field("value", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Image:
    """An encoded image: its bytes, or a path under the data's image root, or both."""

    bytes: bytes | None = None
    path: str | None = None


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
    """

    id: str
    images: tuple[Image, ...]
    instruction: str
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


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
