"""What a model sees of one row: token ids, pixels or features, each checked, errors naming the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float32

from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError


class PixelProcessor(Protocol):
    """What `contrastive_batches` needs of `data.dual_inputs.DualEncoderProcessor`."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def pixel_values(self, prompt: Prompt) -> np.ndarray: ...


class PromptProcessor(PixelProcessor, Protocol):
    """What the other pipelines need of `models.processor.Processor`."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def encode_prompt(self, prompt: Prompt) -> Sequence[int] | np.ndarray: ...

    def encode_answer(self, text: str) -> Sequence[int] | np.ndarray: ...

    def image_keys(self, prompt: Prompt) -> list[str]: ...


def pixels_of(processor: PixelProcessor, prompt: Prompt) -> np.ndarray | None:
    """Pixels of a prompt's images, or None; whatever a decoder raises becomes one line that names the row."""
    if not prompt.images:
        return None
    try:
        return np.asarray(processor.pixel_values(prompt), np.float32)
    except UserError:
        raise
    except Exception as error:  # decoders of hostile files raise anything
        raise UserError(
            f"cannot read the image ({type(error).__name__}: {error})",
            where=where_of(prompt),
            remedy="replace the image or drop the row",
        ) from error


def no_pixels(processor: PixelProcessor, prompt: Prompt) -> Float32[np.ndarray, "m h w 3"]:
    """Zeros that take no memory, where another host needs the prompt's images."""
    return np.broadcast_to(np.float32(0), (len(prompt.images), *processor.image_shape))


def seen_images(
    processor: PixelProcessor, prompt: Prompt, features: PromptFeatures | None, *, needed: bool = True
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(pixels, features) of a prompt's images, of which one is given at most; zeros where they are not needed."""
    if not needed and prompt.images:
        return (no_pixels(processor, prompt), None) if features is None else (None, features.absent(prompt))
    if features is None:
        return pixels_of(processor, prompt), None
    return None, features(prompt)


def prompt_ids(processor: PromptProcessor, prompt: Prompt) -> np.ndarray:
    return np.asarray(processor.encode_prompt(prompt), np.int32)


def checked_answer(ids: Sequence[int] | np.ndarray, limit: int, where: str) -> np.ndarray:
    """Token ids of one answer, checked: cutting an answer would teach the model to stop nowhere."""
    if len(ids) == 0:
        raise UserError("the answer has no tokens", where=where, remedy="drop the row")
    if len(ids) > limit:
        raise UserError(
            f"the answer has {len(ids)} tokens, more than train.max_answer_tokens = {limit}",
            where=where,
            remedy="raise it, or drop the row",
        )
    return np.asarray(ids, np.int32)


def where_of(prompt: Prompt) -> str:
    return prompt.where or f"id {prompt.id!r}"
